"""Page access: which of read, write and execute a guest has on a page, as KVMI pairs it with the write bitmap.

Write access is no state of its own: a page has it when its SET map is all ones, and any zero takes it away and leaves
the sub-pages whose bit is 1 exempt (kvm-spp 9.1, 9.4). Only the lack of read and execute is stored here.
"""

from engine.arch import ept as bits
from engine.arch import exits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import radix
from engine.cpu.frames import ample
from engine.jit import kernel
from engine.kvm import layers, spp
from engine.kvm import registers as reg

KEPT = bits.READ | bits.EXECUTE

# A row of a batch
ROW_GFN = 0
ROW_RIGHTS = 1
ROW_MAP = 2
ROW_WORDS = 3


@kernel
def lacking(m, gfn):
    """Rights of read and execute that a page lacks, as bits of an EPT entry."""
    return radix.read(m, reg.ROOT_ACCESS, gfn) & KEPT


@kernel
def store_lacking(m, gfn, rights):
    """Replace them."""
    radix.write(m, reg.ROOT_ACCESS, gfn, rights & KEPT)


@kernel
def refuses(m, gfn, qualification):
    """Whether an EPT violation is what page access asks for: a right that the page lacks was wanted.

    A page without read is not eligible for sub-page permissions, so no write to it is either.
    """
    gone = lacking(m, gfn)
    if gone == 0:
        return False
    wanted = qualification & bits.RIGHTS
    return wanted & gone != 0 or (gone & bits.READ != 0 and qualification & exits.Q_WRITE != 0)


@kernel
def rights_of(m, gfn):
    """Read, write and execute of a page, as bits of an EPT entry."""
    rights = KEPT & ~lacking(m, gfn)
    if layers.denied_by_set(m, gfn) == 0:
        rights |= bits.WRITE
    return rights


@kernel
def read_rights(m, gfns, out):
    """Fill ``out`` (int64[n, ROW_WORDS]) with GFN, rights and write bitmap of pages."""
    for i in range(gfns.shape[0]):
        out[i, ROW_GFN] = gfns[i]
        out[i, ROW_RIGHTS] = rights_of(m, gfns[i])
        out[i, ROW_MAP] = ~layers.denied_by_set(m, gfns[i]) & FULL_ACCESS


@kernel
def store_rights(m, rows, start, trail):
    """Set page access and write bitmap from ``rows`` (int64[n, ROW_WORDS]); returns how many are done."""
    for i in range(start, rows.shape[0]):
        if not ample(m):
            return i
        gfn = rows[i, ROW_GFN]
        store_lacking(m, gfn, KEPT & ~rows[i, ROW_RIGHTS])
        spp.set_map(m, gfn, rows[i, ROW_MAP], trail)
    return rows.shape[0]
