"""Memory that slots of both address spaces show: what it holds outlives a slot while another shows it.

Two slots in one range of user memory are the same memory, and it is kept under the page of space 0 where there is one
(``cpu.memory_slots``). It changes hands when a slot of space 0 comes or goes; what space 1 had mapped of it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.kvm import slot_changes
from engine.kvm.host_memory_events import UNMAP, change_range
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import PAGE_SHIFT, SlotSpec
from engine.state.frame_store import Draft
from engine.state.retry import new_trail, run_all


def take_over(draft: Draft, slots: SlotMap, spec: SlotSpec) -> None:
    """A slot of space 0 came: what space 1 had in its memory is the slot's."""
    for there, here, pages in _common(slots, spec):
        _unmap(draft, there, pages)
        _hand_over(draft, there, here, pages)


def hand_back(draft: Draft, slots: SlotMap, spec: SlotSpec) -> None:
    """A slot of space 0 goes: space 1 keeps what it shows of its memory."""
    for there, here, pages in _common(slots, spec):
        _unmap(draft, there, pages)
        _hand_over(draft, here, there, pages)


def unmap(draft: Draft, slots: SlotMap, spec: SlotSpec) -> None:
    """A slot of space 0 moves, and with it the host frames of its memory."""
    for there, _, pages in _common(slots, spec):
        _unmap(draft, there, pages)


def _common(slots: SlotMap, spec: SlotSpec) -> Iterator[tuple[int, int, int]]:
    """(first page in space 1, first page in space 0, pages) of what a slot of space 0 has in common with each of 1."""
    if spec.address_space or not spec.userspace_addr:
        return
    for other in slots.of_space(1):
        first = max(other.userspace_addr, spec.userspace_addr)
        end = min(other.userspace_addr + other.size, spec.userspace_addr + spec.size)
        if other.userspace_addr and first < end:
            there = other.first_page + (first - other.userspace_addr >> PAGE_SHIFT)
            here = spec.first_page + (first - spec.userspace_addr >> PAGE_SHIFT)
            yield there, here, end - first >> PAGE_SHIFT


def _unmap(draft: Draft, page: int, pages: int) -> None:
    trail, changed = new_trail(), np.zeros(1, dtype=np.int64)
    run_all(draft, pages, lambda start: change_range(draft.machine, UNMAP, page, pages, start, changed, trail))


def _hand_over(draft: Draft, old: int, new: int, pages: int) -> None:
    """Move contents, and nothing else, from pages to others that have none."""
    moved = lift(draft, old, pages)
    moved = moved[moved[:, slot_changes.PAGE_CONTENT] != 0]
    detach(draft, old, moved)
    run_all(draft, len(moved), lambda start: slot_changes.store_contents(draft.machine, new, moved, start))


def lift(draft: Draft, page: int, pages: int) -> NDArray[np.int64]:
    """What goes with the pages of a range: a row of ``kvm.slot_changes`` for each that has something."""
    trail = new_trail()
    moved = np.zeros((0, slot_changes.PAGE_WORDS), dtype=np.int64)
    while (found := int(slot_changes.lift_pages(draft.machine, page, pages, moved, trail))) > len(moved):
        moved = np.zeros((found, slot_changes.PAGE_WORDS), dtype=np.int64)
    return moved


def detach(draft: Draft, page: int, moved: NDArray[np.int64]) -> None:
    """Take the contents of lifted pages out of the tree, so that dropping the range leaves them alone."""
    empty = moved.copy()
    empty[:, slot_changes.PAGE_CONTENT] = 0
    run_all(draft, len(moved), lambda start: slot_changes.store_contents(draft.machine, page, empty, start))
