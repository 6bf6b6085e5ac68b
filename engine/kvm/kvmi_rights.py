"""Rights that page access takes from whole pages (KVMI_SET_PAGE_ACCESS), as mapping and fault handling see them.

The word of a page (``cpu.radix``) has the bits of read, write and execute that it lacks. Write is enforced by the SET
map, with which it is paired; its bit here says that page access took it, which KVM's emulator knows, and keeps the
page's leaf small.
"""

from engine.arch import ept as bits
from engine.arch import exits
from engine.cpu import radix
from engine.jit import kernel
from engine.kvm import bitmaps
from engine.kvm.state_frame import ROOT_ACCESS

KEPT = bits.READ | bits.EXECUTE


@kernel
def read(m, gfn):
    """The word of a page."""
    return radix.read(m, ROOT_ACCESS, gfn)


@kernel
def store(m, gfn, gone):
    """Replace the word of a page."""
    radix.write(m, ROOT_ACCESS, gfn, gone & bits.RIGHTS)


@kernel
def lacking(m, gfn):
    """Read and execute, as far as a page lacks them."""
    return read(m, gfn) & KEPT


@kernel
def closed(m, gfn):
    """Sub-pages that no write may touch because page access says so, whatever the version does about the maps."""
    return bitmaps.denied_by_set(m, gfn) if read(m, gfn) & bits.WRITE else 0


@kernel
def restricted(m, gfn, level):
    """Whether a page of the region of ``level`` 2 or 3 around a page lacks a right; nodes are freed when none does."""
    return radix.node_of(m, ROOT_ACCESS, gfn, level - 2) != 0


@kernel
def refuses(m, gfn, qualification):
    """Whether an EPT violation is what page access asks for: the page lacks a right that was wanted.

    A page without read is not eligible for sub-page permissions, so no write to it is either.
    """
    gone = lacking(m, gfn)
    if gone == 0:
        return False
    if gone & bits.READ and qualification & exits.Q_WRITE:
        return True
    return qualification & gone != 0
