"""Memory slots of a machine: making, moving, changing and deleting them (KVM_SET_USER_MEMORY_REGION).

There are two address spaces. Space 1 is what a vCPU sees in system-management mode (``machine.address_spaces``).
"""

from __future__ import annotations

from engine.arch.words import signed, unsigned
from engine.errors import NotFound
from engine.kvm import slot_changes
from engine.kvm import state_frame as reg
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec, key_of
from engine.machine import common_memory, page_logs
from engine.machine.state import Operations, register
from engine.state.frame_store import Draft
from engine.state.profiles import kvm_version
from engine.state.retry import new_trail, run_all


class SlotOperations(Operations):
    """The memory slots of one machine."""

    @property
    def known(self) -> SlotMap:
        """Slots by ``SlotSpec.key``; another mapping after each change of them."""
        return self._state.current.slots

    def all(self) -> tuple[SlotSpec, ...]:
        """Slots in order of their number, those of address space 1 last."""
        return tuple(spec for _, spec in sorted(self._state.current.slots.items()))

    def find(self, slot: int, address_space: int = 0) -> SlotSpec | None:
        """The slot of that number, if there is one."""
        return self._state.current.slots.get(key_of(slot, address_space))

    @property
    def wanted_mmu_pages(self) -> int:
        """What ``want_mmu_pages`` was told last, 0 before."""
        return unsigned(register(self._published.machine, reg.MMU_PAGES))

    def want_mmu_pages(self, count: int) -> None:
        """KVM_SET_NR_MMU_PAGES: how many pages user space lets the MMU keep, 64 bits. It is kept and nothing more."""
        with self._state.change() as draft:
            page_logs.store_register(draft.machine, reg.MMU_PAGES, signed(count))

    def set(self, spec: SlotSpec) -> None:
        """Make a slot, move a known one, change whether its writes are logged, or open the file behind it again.

        Raises InvalidValue, with EEXIST for one that overlaps another of its address space.
        """
        state = self._state.current
        spec.validate_number(kvm_version(self._config.profile).limits.user_slots)
        spec.validate_place()
        known = state.slots.get(spec.key)
        if known is not None:
            if known == spec and _same_file(known, spec):
                return
            slot_changes.check_change(known, spec)
        slots = state.slots.with_slot(spec)
        spec.validate_width(self._config.maxphyaddr)
        with self._state.change(since=state, slots=slots) as draft:
            if known is not None:
                page_logs.empty_buffers(draft, state.slots)
            if known is None:
                common_memory.take_over(draft, slots, spec)
            elif known.gpa != spec.gpa:
                common_memory.unmap(draft, slots, spec)
                _move(draft, known, spec)
            page_logs.slot_changed(draft, slots, known, spec)

    def delete(self, slot: int, address_space: int = 0) -> None:
        """Delete a slot with its SET maps and contents. Raises NotFound."""
        state = self._state.current
        key = key_of(slot, address_space)
        spec = state.slots.get(key)
        if spec is None:
            raise NotFound("must be the number of an existing slot", field="slot", value=slot)
        slots = state.slots.without(key)
        with self._state.change(since=state, slots=slots) as draft:
            page_logs.empty_buffers(draft, state.slots)
            common_memory.hand_back(draft, slots, spec)
            _drop(draft, spec)
            page_logs.note_slots(draft, slots)


def _same_file(known: SlotSpec, spec: SlotSpec) -> bool:
    """Whether they are backed by one open file, or none; one that was put back is another."""
    if known.backing is None or spec.backing is None:
        return True
    return known.backing.opened is spec.backing.opened


def _move(draft: Draft, old: SlotSpec, new: SlotSpec) -> None:
    moved = common_memory.lift(draft, old.first_page, old.pages)
    common_memory.detach(draft, old.first_page, moved)
    _drop(draft, old)
    run_all(draft, len(moved), lambda start: slot_changes.place_pages(draft.machine, new.first_page, moved, start))


def _drop(draft: Draft, spec: SlotSpec) -> None:
    trail, first = new_trail(), spec.first_page
    run_all(draft, spec.pages, lambda start: slot_changes.drop_pages(draft.machine, first, spec.pages, start, trail))
