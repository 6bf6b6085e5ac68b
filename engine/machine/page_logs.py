"""Page-modification logs of a machine's vCPUs, and the logs of its slots: given, emptied, taken away.

What the processors logged is taken note of before anything that it depends on changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept
from engine.cpu import frames, host_physical_memory
from engine.cpu.page_log import INDEX_MASK, LOG_ENTRIES
from engine.errors import Conflict, Unsupported
from engine.kvm import dirty_harvest, dirty_marking
from engine.kvm import state_frame as reg
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec
from engine.machine.state import register
from engine.state.config import VmConfig
from engine.state.frame_store import Draft
from engine.state.retry import new_trail, run_all


def empty_buffers(draft: Draft, slots: SlotMap | None = None) -> None:
    """Take note of what the processors logged; ``slots`` are those it was logged under, if they are about to change."""
    if not register(draft.machine, reg.DIRTY_MODE) & dirty_marking.BY_PML:
        return
    after = draft.machine.slots
    if slots is not None:
        draft.machine = draft.machine.replaced(slots=slots.table)
    for position in range(frames.records(draft.machine)):
        draft.ensure(20 * LOG_ENTRIES)
        dirty_harvest.empty_buffer(draft.machine, position, np.int64(0))
    draft.machine = draft.machine.replaced(slots=after)


def use_buffers(draft: Draft, config: VmConfig, method: str) -> None:
    """Give every vCPU a page-modification log, or take it away. Raises Unsupported, Conflict."""
    uses = bool(register(draft.machine, reg.DIRTY_MODE) & dirty_marking.BY_PML)
    if uses == (method == "pml"):
        return
    if not uses:
        _check_page_log(draft.machine, config)
    draft.ensure(2 * frames.records(draft.machine))  # the log, and the record that says where it is
    machine = draft.machine
    for frame in _vcpu_frames(machine):
        if uses:
            _take_buffer(machine, frame)
        else:
            _give_buffer(machine, frame)


def follow_siblings(machine: frames.Machine, position: int) -> None:
    """Give a vCPU that was just made a page-modification log where the others have one."""
    if register(machine, reg.DIRTY_MODE) & dirty_marking.BY_PML:
        _give_buffer(machine, int(frames.FIRST_VCPU_FRAME) + position)


def _give_buffer(machine: frames.Machine, frame: int) -> None:
    address = int(frames.address_of(machine, frames.new_frame(machine, frames.CLIENT)))
    _set_buffer(machine, frame, address, int(frames.read_word(machine, frame, ctl.V_SECONDARY)) | ctl.SECONDARY_PML)


def _take_buffer(machine: frames.Machine, frame: int) -> None:
    buffer = int(host_physical_memory.frame_at(machine, frames.read_word(machine, frame, ctl.V_PML_ADDRESS)))
    if buffer >= 0:
        frames.free_frame(machine, buffer)
    _set_buffer(machine, frame, 0, int(frames.read_word(machine, frame, ctl.V_SECONDARY)) & ~ctl.SECONDARY_PML)


def _set_buffer(machine: frames.Machine, frame: int, address: int, secondary: int) -> None:
    frames.write_word(machine, frame, ctl.V_PML_ADDRESS, address)
    frames.write_word(machine, frame, ctl.V_PML_INDEX, LOG_ENTRIES - 1)
    frames.write_word(machine, frame, ctl.V_SECONDARY, secondary)


def buffered_pages(machine: frames.Machine, slots: SlotMap) -> NDArray[np.int64]:
    """GFNs in the page-modification logs that no log has taken note of yet, in slots of address space 0."""
    found: list[int] = []
    if register(machine, reg.DIRTY_MODE) & dirty_marking.BY_PML:
        for frame in _vcpu_frames(machine):
            if int(frames.read_word(machine, frame, ctl.V_SPACE)):
                continue
            table = int(frames.read_word(machine, frame, ctl.V_PML_ADDRESS))
            first = (int(frames.read_word(machine, frame, ctl.V_PML_INDEX)) + 1) & INDEX_MASK
            entries = (int(host_physical_memory.read_entry(machine, table, n)) for n in range(first, LOG_ENTRIES))
            found += ((entry & ept.ADDRESS) >> 12 for entry in entries)
    gfns = np.array(found, dtype=np.int64)
    held: NDArray[np.int64] = gfns[np.array([slots.holding(gfn) is not None for gfn in found], dtype=bool)]
    return held


def slot_changed(draft: Draft, slots: SlotMap, old: SlotSpec | None, new: SlotSpec) -> None:
    """After a slot came or changed: its log begins empty, ends with the flag, and its pages are watched or no longer.

    ``slots`` are the slots from now on.
    """
    note_slots(draft, slots)
    had = old is not None and old.log_dirty
    if had == new.log_dirty:
        return
    if had:
        out = np.zeros((new.pages + dirty_marking.LOG_MASK) >> dirty_marking.LOG_SHIFT, dtype=np.int64)
        trail = new_trail()
        run_all(
            draft,
            new.pages,
            lambda at: dirty_harvest.take_log(draft.machine, new.first_page, at, new.pages, out, trail),
        )
    watch_slot(draft, new)


def note_slots(draft: Draft, slots: SlotMap) -> None:
    """Note whether a slot has KVM's log."""
    mode = register(draft.machine, reg.DIRTY_MODE) & ~dirty_marking.SLOT_LOGS
    if slots.logged:
        mode |= dirty_marking.SLOT_LOGS
    store_register(draft.machine, reg.DIRTY_MODE, mode)


def watch_slot(draft: Draft, spec: SlotSpec) -> None:
    """Bring the mapped pages of a slot in line with what is tracked."""
    trail, first = new_trail(), spec.first_page
    run_all(draft, spec.pages, lambda at: dirty_harvest.watch_mapped(draft.machine, first, at, spec.pages, trail))


def store_register(machine: frames.Machine, position: np.int64, word: int) -> None:
    """Store a word of the state frame."""
    frames.write_word(machine, frames.STATE_FRAME, position, np.int64(word))


def _check_page_log(machine: frames.Machine, config: VmConfig) -> None:
    host = config.host
    flags = host.capability("ept_vpid_cap") & ept.CAP_ACCESSED_DIRTY
    if not flags or not host.secondary_allowed & ctl.SECONDARY_PML or host.vendor != "intel":
        raise Unsupported(
            "must be write-protect: this host lacks a page-modification log or EPT dirty flags",
            field="method",
            value="pml",
        )
    for frame in _vcpu_frames(machine):
        if int(frames.read_word(machine, frame, ctl.V_SECONDARY)) & ctl.SECONDARY_PML:
            raise Conflict(
                "must be write-protect: the page-modification log of a vCPU is in use, its VMCS was written",
                field="method",
                value="pml",
            )


def _vcpu_frames(machine: frames.Machine) -> range:
    first = int(frames.FIRST_VCPU_FRAME)
    return range(first, first + frames.records(machine))
