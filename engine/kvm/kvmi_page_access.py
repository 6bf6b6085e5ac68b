"""Page access in batches, paired with the write bitmap (KVMI_SET_PAGE_ACCESS, KVMI_SET_PAGE_WRITE_BITMAP).

Write access is no state of its own: a page has it when its SET map is all ones, and any zero takes it away and leaves
the sub-pages whose bit is 1 exempt (kvm-spp 9.1, 9.4).
"""

from engine.arch import ept as bits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu.frames import ample
from engine.jit import kernel
from engine.kvm import bitmaps, kvmi_rights, mapping, spp_set

# A row of a batch
ROW_GFN = 0
ROW_RIGHTS = 1
ROW_MAP = 2
ROW_WORDS = 3


@kernel
def rights_of(m, gfn):
    """Read, write and execute of a page, as bits of an EPT entry."""
    rights = kvmi_rights.KEPT & ~kvmi_rights.lacking(m, gfn)
    if bitmaps.denied_by_set(m, gfn) == 0:
        rights |= bits.WRITE
    return rights


@kernel
def read_rights(m, gfns, out):
    """Fill ``out`` (int64[n, ROW_WORDS]) with GFN, rights and write bitmap of pages."""
    for i in range(gfns.shape[0]):
        out[i, ROW_GFN] = gfns[i]
        out[i, ROW_RIGHTS] = rights_of(m, gfns[i])
        out[i, ROW_MAP] = ~bitmaps.denied_by_set(m, gfns[i]) & FULL_ACCESS


@kernel
def store_rights(m, rows, start, trail):
    """Set page access and write bitmap from ``rows`` (int64[n, ROW_WORDS]); returns how many are done.

    The leaf is dropped, whatever its size, and the next access makes it anew.
    """
    for i in range(start, rows.shape[0]):
        if not ample(m):
            return i
        gfn = rows[i, ROW_GFN]
        mapping.unmap_page(m, gfn, trail)
        kvmi_rights.store(m, gfn, bits.RIGHTS & ~rows[i, ROW_RIGHTS])
        spp_set.set_map(m, gfn, rows[i, ROW_MAP], trail)
    return rows.shape[0]
