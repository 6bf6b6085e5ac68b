"""All memory slots of a machine, as one state of them: what a change of one slot costs does not depend on the others.

A map is never changed. Another one comes of it, which takes copies of arrays and of a dictionary but looks at no slot
beside the neighbours of the one that changes.
"""

from __future__ import annotations

import json
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from engine.cpu.memory_slots import SLOT_WORDS
from engine.errors import InvalidValue
from engine.kvm.slot_files import SlotFile, with_files
from engine.kvm.slots import ADDRESS_SPACES, SlotSpec, slot_row, slot_table

_NO_TABLE: NDArray[np.int64] = np.zeros((0, SLOT_WORDS), dtype=np.int64)


class SlotMap(Mapping[int, SlotSpec]):
    """Slots by ``SlotSpec.key``.

    ``table`` is int64[n, SLOT_WORDS], sorted by first page, as kernels look it up; ``logged`` how many slots have KVM's
    dirty log; ``files`` those behind slots, by key. The table keeps them open.
    """

    __slots__ = ("__weakref__", "_by_key", "_changed", "_order", "_rows", "files", "logged", "table")

    def __init__(self) -> None:
        self._by_key: dict[int, SlotSpec] = {}
        # Of each address space, (GPA, key) in order.
        self._order: tuple[list[tuple[int, int]], ...] = tuple([] for _ in range(ADDRESS_SPACES))
        self._rows: dict[int, str] = {}
        # The map that this one came of, and the key that differs.
        self._changed: tuple[weakref.ref[SlotMap], int] | None = None
        self.table = _NO_TABLE
        self.logged = 0
        self.files: dict[int, SlotFile] = {}

    @classmethod
    def of(cls, specs: Iterable[SlotSpec]) -> SlotMap:
        """A map of slots of which none overlaps another."""
        found = cls()
        found._by_key = {spec.key: spec for spec in specs}
        found._order = tuple(
            sorted((s.gpa, s.key) for s in found._by_key.values() if s.address_space == space)
            for space in range(ADDRESS_SPACES)
        )
        found.files = {spec.key: spec.backing for spec in found._by_key.values() if spec.backing is not None}
        found.table = with_files(slot_table(found._by_key.values()), found.files.values())
        found._rows = {spec.key: _row_json(spec) for spec in found._by_key.values()}
        found.logged = sum(spec.log_dirty for spec in found._by_key.values())
        return found

    def __getitem__(self, key: int) -> SlotSpec:
        return self._by_key[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def with_slot(self, spec: SlotSpec) -> SlotMap:
        """The map with a slot more, or with one replaced. Raises InvalidValue (EEXIST) where it overlaps another."""
        after = self._copy() if spec.key not in self._by_key else self.without(spec.key)
        order = after._order[spec.address_space]
        at = bisect_left(order, (spec.gpa, spec.key))
        for _, key in order[max(at - 1, 0) : at + 1]:
            _check_apart(spec, self._by_key[key])
        order.insert(at, (spec.gpa, spec.key))
        after._by_key[spec.key] = spec
        after._rows[spec.key] = _row_json(spec)
        after._changed = weakref.ref(self), spec.key
        after.logged += spec.log_dirty
        if spec.backing is not None:
            after.files[spec.key] = spec.backing
        table = np.insert(after.table, after._row_of(spec, at), slot_row(spec), axis=0)
        after.table = with_files(table, after.files.values())
        return after

    def without(self, key: int) -> SlotMap:
        """The map without a slot that it has."""
        after = self._copy()
        spec = after._by_key.pop(key)
        del after._rows[key]
        after._changed = weakref.ref(self), key
        order = after._order[spec.address_space]
        at = bisect_left(order, (spec.gpa, key))
        del order[at]
        after.logged -= spec.log_dirty
        after.files.pop(key, None)
        after.table = with_files(np.delete(after.table, after._row_of(spec, at), axis=0), after.files.values())
        return after

    def changed_since(self, earlier: Mapping[int, SlotSpec]) -> list[int]:
        """Keys of the slots that are others than in an earlier map, in order."""
        if self._changed is not None and self._changed[0]() is earlier:
            return [self._changed[1]]
        return sorted(key for key in {*earlier, *self} if earlier.get(key) is not self.get(key))

    @property
    def json(self) -> str:
        """The slots as a JSON array of their members' arrays (``SlotSpec.row``)."""
        return f"[{', '.join(self._rows.values())}]"

    def holding(self, gfn: int) -> SlotSpec | None:
        """The slot of address space 0 that holds a page."""
        order = self._order[0]
        at = bisect_left(order, ((gfn + 1) << 12, -1)) - 1
        spec = self._by_key[order[at][1]] if at >= 0 else None
        return spec if spec is not None and gfn < spec.gfn + spec.pages else None

    def of_space(self, space: int) -> list[SlotSpec]:
        """The slots of an address space, by GPA."""
        return [self._by_key[key] for _, key in self._order[space]]

    def _row_of(self, spec: SlotSpec, at: int) -> int:
        """Row of the slot that is at position ``at`` of its address space."""
        return at + sum(len(order) for order in self._order[: spec.address_space])

    def _copy(self) -> SlotMap:
        twin = SlotMap()
        twin._by_key = self._by_key.copy()
        twin._rows = self._rows.copy()
        twin._order = tuple(order.copy() for order in self._order)
        twin.table, twin.logged, twin.files = self.table, self.logged, self.files.copy()
        return twin


def _row_json(spec: SlotSpec) -> str:
    return json.dumps(spec.row())


def _check_apart(spec: SlotSpec, other: SlotSpec) -> None:
    if other.overlaps(spec):
        raise InvalidValue(
            f"must not overlap slot {other.slot}, which covers {other.gpa:#x} to {other.gpa + other.size - 1:#x}",
            field="gpa",
            value=spec.gpa,
            errno="EEXIST",
        )
