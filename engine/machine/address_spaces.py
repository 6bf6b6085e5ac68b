"""Which address space each vCPU of a machine is in, and what changes when that does (kvm_smm_changed in the kernel).

A vCPU in system-management mode sees the slots of address space 1 once the machine has one, under a root of its own.
Leaving or entering is a reset of its MMU: KVM loads the root, whatever EPTP the vCPU had, and flushes what its
processor remembers of it. What that logged so far was written in the space that the vCPU leaves.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept
from engine.cpu import frames, tlb
from engine.cpu.memory_slots import SLOT_GFN, SMM, SMM_PAGE
from engine.cpu.page_log import LOG_ENTRIES
from engine.kvm import dirty_harvest, dirty_marking, mapping
from engine.kvm import state_frame as reg
from engine.state.frame_store import Draft


def follow(draft: Draft, in_smm: Iterable[int]) -> None:
    """Bring the vCPUs in line with their mode and with the slots; ``in_smm`` are the positions of those in SMM."""
    m = draft.machine
    first, count = int(frames.FIRST_VCPU_FRAME), frames.records(m)
    wanted = np.zeros(count, dtype=np.int64)
    if has_smm_slots(m):
        _make_root(draft)
        wanted[list(in_smm)] = SMM
    known = m.rows[m.row_of[first : first + count], ctl.V_SPACE]
    for position in np.flatnonzero(known != wanted).tolist():
        _switch(draft, position, int(wanted[position]))


def has_smm_slots(m: frames.Machine) -> bool:
    """Whether there is a slot of address space 1; they are the last ones."""
    return len(m.slots) > 0 and bool(m.slots[-1, SLOT_GFN] >= SMM_PAGE)


def _make_root(draft: Draft) -> None:
    """The root of the EPT for address space 1, empty, where there is none."""
    if not frames.read_word(draft.machine, frames.STATE_FRAME, reg.ROOT_EPT_SMM):
        draft.ensure()
        root = frames.new_frame(draft.machine, frames.EPT)
        frames.write_word(draft.machine, frames.STATE_FRAME, reg.ROOT_EPT_SMM, root)


def pointer_to(m: frames.Machine, gfn: int) -> int:
    """EPTP that KVM loads for the address space of a page."""
    eptp = int(mapping.ept_pointer(m, np.int64(gfn)))
    return eptp | (ept.EPTP_ACCESSED_DIRTY if int(m.caps[frames.CAP_EPT_VPID]) & ept.CAP_ACCESSED_DIRTY else 0)


def _switch(draft: Draft, position: int, space: int) -> None:
    if int(frames.read_word(draft.machine, frames.STATE_FRAME, reg.DIRTY_MODE)) & dirty_marking.BY_PML:
        draft.ensure(20 * LOG_ENTRIES)
        dirty_harvest.empty_buffer(draft.machine, position, np.int64(0))
    draft.ensure()
    m, frame = draft.machine, int(frames.FIRST_VCPU_FRAME) + position
    eptp = pointer_to(m, space >> 12)
    frames.write_word(m, frame, ctl.V_SPACE, space)
    frames.write_word(m, frame, ctl.V_EPTP, eptp)
    table = m.tlb[1:]
    own = (table[:, tlb.E_KIND] >> tlb.VCPU_SHIFT == position) & (table[:, tlb.E_ROOT] == eptp & ept.ADDRESS)
    table[own, tlb.E_GENERATION] = 0
