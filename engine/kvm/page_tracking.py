"""Whole pages that the guest must not write, where there is no sub-page protection (KVM's page tracking).

It takes the place of sub-page protection before that is enabled, and on a host that never has it; the maps are the
truth here, too, and say nothing or everything of a page. KVM takes write permission, and its own leave to give it back,
from the leaf of such a page: a write ends as an ordinary EPT violation, ``fast_page_fault`` has no answer to it, and
the page is mapped by 4 KBytes in every version (mmu_need_write_protect, kvm_mmu_gfn_disallow_lpage in Linux 5.3;
make_spte, kvm_write_track_add_gfn in 7.1).
"""

from engine.arch import exits
from engine.arch.sppt import FULL_ACCESS
from engine.cpu import sppt
from engine.cpu.access_over_pages import page_part
from engine.cpu.frames import STATE_FRAME, read_word
from engine.jit import kernel
from engine.kvm import bitmaps
from engine.kvm.state_frame import SPP_ACTIVE


@kernel
def active(m):
    """Whether protected pages are tracked: sub-page protection is off."""
    return read_word(m, STATE_FRAME, SPP_ACTIVE) == 0


@kernel
def tracks(m, gfn):
    """Whether writes to a page are tracked, and so refused."""
    return active(m) and bitmaps.effective(m, gfn) != FULL_ACCESS


@kernel
def refused(m, at, end, qualification):
    """Sub-pages that a refused access touched of a tracked page, none of any other; it is the part below ``end``."""
    if not qualification & exits.Q_WRITE or not active(m):
        return 0
    return sppt.touched(at, page_part(at, end)) & ~bitmaps.effective(m, at >> 12) & FULL_ACCESS
