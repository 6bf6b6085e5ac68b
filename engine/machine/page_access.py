"""Page access of a machine, read and set in batches (KVMI_GET_PAGE_ACCESS, KVMI_SET_PAGE_ACCESS and _WRITE_BITMAP).

How access and write bitmap are paired (kvm-spp 9.1, 9.3, 9.4):

* a bitmap of all ones gives write access, any zero takes it away;
* write access without a bitmap makes the bitmap all ones;
* no write access without a bitmap keeps the bitmap, or makes it 0 where it was all ones;
* both together must say the same.

Without sub-page protection a bitmap is all ones or 0: KVM tracks whole pages then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import ept
from engine.arch.sppt import FULL_ACCESS
from engine.cpu.frames import Machine
from engine.errors import EngineError, InvalidValue, NotEnabled
from engine.kvm import kvmi_page_access as kernels
from engine.kvm.enabling_checks import not_enabled
from engine.kvm.slots import check_pages
from engine.machine.state import Operations
from engine.state.config import choices
from engine.state.frame_store import Draft
from engine.state.retry import new_trail

MODES = ("atomic", "apply-all", "stop-at-first")

# KVMI's messages hold 255 entries; ours are larger.
MAX_ENTRIES = 4096

RIGHT_NAMES = {"r": ept.READ, "w": ept.WRITE, "x": ept.EXECUTE}


@dataclass(frozen=True, slots=True)
class AccessChange:
    """What a page is to have: ``rights`` as bits 0 read, 1 write, 2 execute; ``bitmap`` 32 bits; None leaves it be."""

    gfn: int
    rights: int | None = None
    bitmap: int | None = None


@dataclass(frozen=True, slots=True)
class PageRights:
    """What a page has: ``rights`` as bits, and the write bitmap as it was set (all ones with write access)."""

    gfn: int
    rights: int
    bitmap: int


@dataclass(frozen=True, slots=True)
class EntryResult:
    """What became of an entry: applied, refused with an error, or not tried."""

    gfn: int
    outcome: str
    error: EngineError | None = None


class AccessOperations(Operations):
    """Page access of one machine."""

    def read(self, gfns: Sequence[int]) -> list[PageRights]:
        """What pages have. Raises InvalidValue for a page without a slot, and for more than MAX_ENTRIES."""
        self._check(len(gfns), "gfn")
        snapshot = self._published
        machine = snapshot.machine
        for gfn in gfns:
            self._check_page(machine, gfn, "gfn")
        out = np.zeros((len(gfns), kernels.ROW_WORDS), dtype=np.int64)
        kernels.read_rights(machine, np.array(gfns, dtype=np.int64), out)
        return [PageRights(*row) for row in out.tolist()]

    def set(self, entries: Sequence[AccessChange], mode: str = "atomic") -> list[EntryResult]:
        """Set entries in order; what each became, one for each.

        ``mode`` atomic: all or, when one is refused, none, and its error is raised with its place. apply-all: every
        entry that is not refused. stop-at-first: those before the first that is refused. NotEnabled is for a bitmap
        that needs sub-page protection where that is off.
        """
        choices(mode, MODES, "mode")
        self._check(len(entries), "entries")
        results: list[EntryResult] = []
        with self._state.change() as draft:
            for position, entry in enumerate(entries):
                error = None
                if mode == "stop-at-first" and results and results[-1].outcome != "applied":
                    results.append(EntryResult(entry.gfn, "not-tried"))
                    continue
                try:
                    self._apply(draft, entry)
                except (InvalidValue, NotEnabled) as refusal:
                    error = refusal
                if error is not None and mode == "atomic":
                    error.field = f"entries[{position}].{error.field}"
                    raise error
                results.append(EntryResult(entry.gfn, "refused" if error else "applied", error))
        return results

    def _check(self, count: int, field: str) -> None:
        if not 1 <= count <= MAX_ENTRIES:
            raise InvalidValue(f"a batch has 1 to {MAX_ENTRIES} entries", field=field, value=count)

    def _check_page(self, machine: Machine, gfn: int, field: str) -> None:
        check_pages(machine, self._config.maxphyaddr, gfn, 1, field)

    def _apply(self, draft: Draft, entry: AccessChange) -> None:
        self._check_page(draft.machine, entry.gfn, "gfn")
        draft.ensure()
        known: NDArray[np.int64] = np.zeros((1, kernels.ROW_WORDS), dtype=np.int64)
        kernels.read_rights(draft.machine, np.array([entry.gfn], dtype=np.int64), known)
        rights, bitmap = self._paired(entry, int(known[0, kernels.ROW_RIGHTS]), int(known[0, kernels.ROW_MAP]))
        row = np.array([[entry.gfn, rights, bitmap]], dtype=np.int64)
        kernels.store_rights(draft.machine, row, 0, new_trail())

    def _paired(self, entry: AccessChange, rights: int, bitmap: int) -> tuple[int, int]:
        """Rights and bitmap that an entry means on a page that has these."""
        if entry.rights is None and entry.bitmap is None:
            raise InvalidValue("must be given, or write_bitmap, or both", field="access", value=None)
        if entry.rights is not None and not 0 <= entry.rights <= ept.RIGHTS:
            raise InvalidValue("access has 3 bits", field="access", value=entry.rights)
        if entry.bitmap is not None and not 0 <= entry.bitmap <= FULL_ACCESS:
            raise InvalidValue("a bitmap has 32 bits", field="write_bitmap", value=entry.bitmap)
        if entry.bitmap not in (None, 0, FULL_ACCESS) and not self._state.current.spp_active:
            why = "without it a bitmap is 0 or all ones"
            raise not_enabled(why, field="write_bitmap", value=entry.bitmap, errno="EOPNOTSUPP")
        if entry.bitmap is not None:
            bitmap = entry.bitmap
            writes = bitmap == FULL_ACCESS
            if entry.rights is not None and bool(entry.rights & ept.WRITE) != writes:
                raise InvalidValue(
                    "write access goes with a bitmap of all ones, and only with that",
                    field="write_bitmap",
                    value=bitmap,
                )
            rights = (rights if entry.rights is None else entry.rights) & ~ept.WRITE | (ept.WRITE if writes else 0)
        else:
            assert entry.rights is not None
            rights = entry.rights
            if rights & ept.WRITE:
                bitmap = FULL_ACCESS
            elif bitmap == FULL_ACCESS:
                bitmap = 0
        if rights & ept.WRITE and not rights & ept.READ:
            raise InvalidValue(
                "EPT gives no write access without read access", field="access", value=text_of(rights), errno="EINVAL"
            )
        only = rights & ept.EXECUTE and not rights & ept.READ
        if only and not self._config.host.executes_only:
            raise InvalidValue(
                "must have r beside x: this host has no execute-only pages",
                field="access",
                value=text_of(rights),
                errno="EOPNOTSUPP",
            )
        return rights, bitmap


def text_of(rights: int) -> str:
    """Rights as ``rwx`` with ``-`` for what is lacking."""
    return "".join(name if rights & bit else "-" for name, bit in RIGHT_NAMES.items())
