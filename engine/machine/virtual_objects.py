"""Objects by linear address: the pieces of guest memory that the guest's own tables put them in, and where they went.

A piece is a ``ProtectedObject`` of the object's name: a run of neighbouring frames. It keeps both addresses, and by
whose tables the first was found, so that the object can be walked again. Whatever names an object otherwise ends here,
too: it becomes a ``VirtualObject`` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.arch.controls import V_GUEST_MODE
from engine.arch.words import signed
from engine.cpu import guest_paging, guest_tables
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine, read_word
from engine.errors import InvalidValue, LimitExceeded
from engine.kvm.protections import MAX_OBJECTS, MAX_PAGES, ProtectedObject, VirtualObject
from engine.state.config import VmConfig
from engine.state.retry import new_trail
from engine.trace.translated import fits_space

PAGE = 4096

Given = ProtectedObject | VirtualObject


class Moved(NamedTuple):
    """``size`` bytes of an object at ``gva``, which were at ``old_gpa`` and are at ``new_gpa``."""

    object: str
    gva: int
    old_gpa: int
    new_gpa: int
    size: int


def resolve(m: Machine, config: VmConfig, given: Sequence[Given]) -> tuple[list[ProtectedObject], list[int]]:
    """The pieces of objects, and the position of the object that each is of.

    Raises InvalidValue for an object that does not translate whole, with the address and the level; LimitExceeded for
    more pieces or pages than a protection may have.
    """
    pages = sum(-(-(item.gva % PAGE + item.size) // PAGE) for item in given if isinstance(item, VirtualObject))
    if pages > MAX_PAGES:
        raise LimitExceeded(f"must lie in at most {MAX_PAGES} pages", field="objects", value=pages)
    pieces: list[ProtectedObject] = []
    owners: list[int] = []
    for position, item in enumerate(given):
        found = [item] if isinstance(item, ProtectedObject) else list(_pieces(m, config, item, f"objects[{position}]"))
        pieces += found
        owners += [position] * len(found)
        if len(pieces) > MAX_OBJECTS:
            rule = f"must be at most {MAX_OBJECTS} objects, of which one by gva counts once for each run of frames"
            raise LimitExceeded(rule, field="objects", value=len(pieces))
    return pieces, owners


def regroup(pieces: Sequence[ProtectedObject]) -> list[tuple[ProtectedObject, ...]]:
    """The pieces of each object, in order, names being distinct; what was not given by ``gva`` is one piece."""
    grouped = groupby(enumerate(pieces), lambda pair: pair[0] if pair[1].vcpu is None else pair[1].name)
    return [tuple(piece for _, piece in group) for _, group in grouped]


def as_given(pieces: Sequence[ProtectedObject]) -> Given:
    """The object that pieces are of."""
    first = pieces[0]
    if first.vcpu is None or first.gva is None:
        return first
    size = sum(piece.size for piece in pieces)
    return VirtualObject(first.name, first.gva, size, first.granularity, first.about, first.vcpu, first.cr3)


def moves(before: Sequence[ProtectedObject], after: Sequence[ProtectedObject]) -> Iterator[Moved]:
    """What is elsewhere now, of objects that are the same: runs that both have in neighbouring frames."""
    for old, new in zip(regroup(before), regroup(after), strict=True):
        cuts = np.cumsum([0, *(piece.size for piece in old)]), np.cumsum([0, *(piece.size for piece in new)])
        offsets = np.unique(np.concatenate(cuts)).astype(np.int64)
        was, now = _where(old, offsets[:-1]), _where(new, offsets[:-1])
        for i in np.flatnonzero(was != now).tolist():
            at, size = int(offsets[i]), int(offsets[i + 1] - offsets[i])
            assert old[0].gva is not None
            yield Moved(old[0].name, old[0].gva + at, int(was[i]), int(now[i]), size)


def _pieces(m: Machine, config: VmConfig, item: VirtualObject, where: str) -> Iterator[ProtectedObject]:
    """The pieces of one object."""
    _check(m, config, item, where)
    vcpu = np.int64(config.vcpu_position(item.vcpu))
    space = guest_paging.OWN_SPACE if item.cr3 is None else np.int64(signed(item.cr3))
    first = item.gva - item.gva % PAGE
    frames = np.zeros(-(-(item.gva % PAGE + item.size) // PAGE), dtype=np.int64)
    steps = np.zeros((guest_paging.STEP_ROWS, 4), dtype=np.int64)
    found = int(guest_tables.locate_pages(m, vcpu, space, np.int64(signed(first)), frames, new_trail(), steps))
    if found < len(frames):
        raise leads_nowhere(f"{where}.gva", max(item.gva, first + found * PAGE), steps)
    starts = np.flatnonzero(np.diff(frames, prepend=frames[0] - 2 * PAGE) != PAGE)
    end = item.gva + item.size
    for start, following in zip(starts.tolist(), [*starts[1:].tolist(), len(frames)], strict=True):
        gva = max(item.gva, first + start * PAGE)
        gpa = int(frames[start]) + gva % PAGE
        size = min(end, first + following * PAGE) - gva
        yield ProtectedObject(item.name, gpa, size, item.granularity, gva, item.about, item.vcpu, item.cr3)


def _check(m: Machine, config: VmConfig, item: VirtualObject, where: str) -> None:
    if item.size <= 0:
        raise InvalidValue("must be at least one byte", field=f"{where}.size", value=item.size)
    if item.gva + item.size > 1 << 64:
        raise InvalidValue("must keep the object within 64 bits", field=f"{where}.gva", value=item.gva)
    check_space(m, config, item.vcpu, item.cr3, f"{where}.")


def check_space(m: Machine, config: VmConfig, vcpu: int, cr3: int | None, where: str = "") -> None:
    """Refuse a vCPU that is none or whose tables are not the guest's own, and what CR3 cannot hold."""
    if all(known.id != vcpu for known in config.vcpus):
        raise InvalidValue(config.vcpu_rule, field=f"{where}vcpu", value=vcpu)
    if read_word(m, FIRST_VCPU_FRAME + config.vcpu_position(vcpu), V_GUEST_MODE):
        rule = "must not be in guest mode: the page tables are walked of a guest that runs no other"
        raise InvalidValue(rule, field=f"{where}vcpu", value=vcpu)
    if cr3 is not None and not fits_space(m, np.int64(signed(cr3))):
        raise InvalidValue("must be a value that CR3 can have", field=f"{where}cr3", value=cr3)


def leads_nowhere(field: str, gva: int, steps: NDArray[np.int64]) -> InvalidValue:
    """The error for an address of which ``guest_tables.locate`` says so, by the last of its ``steps``."""
    level = int(steps[0, 1])
    if level == 0:
        return InvalidValue("must be canonical: this address can have no translation", field=field, value=hex(gva))
    _, slot, _, entry = (int(word) for word in steps[level])
    what = "has a reserved bit set" if entry & 1 else "is not present"
    where = f"at GPA {slot:#x}" if slot >= 0 else "in a register"
    rule = f"must translate: its entry of level {level}, {where}, is {entry & (1 << 64) - 1:#x} and {what}"
    return InvalidValue(rule, field=field, value=hex(gva))


def _where(pieces: Sequence[ProtectedObject], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """GPAs of bytes of an object."""
    begins = np.cumsum([0, *(piece.size for piece in pieces[:-1])])
    at = np.searchsorted(begins, offsets, side="right") - 1
    gpas: NDArray[np.int64] = np.array([piece.gpa for piece in pieces], dtype=np.int64)[at]
    found: NDArray[np.int64] = gpas + offsets - begins[at]
    return found
