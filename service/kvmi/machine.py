"""A machine of the service as a connection sees and changes it, and which of its pages the tool has restricted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

from engine.errors import Busy, Conflict, EngineError, InvalidValue, LimitExceeded, NotFound, OutOfMemory, Unsupported
from engine.ioctls import registers_of
from engine.kvm.slot_map import SlotMap
from engine.machine import VirtualMachine
from engine.machine.page_access import MAX_ENTRIES, AccessChange
from service.kvmi.events import EVENT_MSRS
from service.kvmi.guest import Change, PageRights, Registers, SetPages, SwitchSppOn, WriteMemory
from service.kvmi.wire import (
    ALL_RIGHTS,
    EAGAIN,
    EINVAL,
    ENOENT,
    ENOMEM,
    EOPNOTSUPP,
    FULL_BITMAP,
    NO_ADDRESS,
    Refused,
)
from service.problems import NotReady, StoreUnavailable
from service.runtime.changes import pages_set
from service.runtime.entry import Entry
from service.runtime.offload import maybe_in_thread

P = ParamSpec("P")
T = TypeVar("T")

# Pages that one tool may have restricted at a time: 1 GiB of guest memory, page by page.
MAX_RESTRICTED = 1 << 18
_INLINE_PAGES = 64
UNKNOWN_REGISTERS = Registers(bytes(144), bytes(312), (0,) * len(EVENT_MSRS))
_OPEN = PageRights(ALL_RIGHTS, FULL_BITMAP)
# What becomes of an exception, first fit.
_ERRORS: tuple[tuple[type[Exception], int], ...] = (
    (Busy, EAGAIN),
    (NotReady, EAGAIN),
    (StoreUnavailable, EAGAIN),
    (LimitExceeded, ENOMEM),
    (OutOfMemory, ENOMEM),
    (NotFound, ENOENT),
    (Unsupported, EOPNOTSUPP),
    (Conflict, EOPNOTSUPP),
    (InvalidValue, EINVAL),
)
_FAILURES = (EngineError, NotReady, StoreUnavailable)


def _errno_of(error: Exception) -> int:
    return next((errno for kind, errno in _ERRORS if isinstance(error, kind)), EINVAL)


def _query(read: Callable[P, T]) -> Callable[P, T]:
    """What the machine fails at while a query reads it, as what behind a slot is not there any more, is its error."""

    @functools.wraps(read)
    def answered(*given: P.args, **named: P.kwargs) -> T:
        try:
            return read(*given, **named)
        except _FAILURES as error:
            raise Refused(_errno_of(error)) from None

    return answered


class MachineGuest:
    """A ``guest.Guest``. Pages that the tool has restricted are in ``restricted``, as it has left them, until they are
    given back."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self.restricted: dict[int, PageRights] = {}
        self._slots: SlotMap | None = None
        self._max_gfn = 0
        # vCPUs by index. Those that come later stand behind those that were there.
        self._ids: list[int] = []
        self._registers: dict[int, tuple[tuple[int, ...], tuple[object, ...], Registers]] = {}

    # As it is

    @property
    def _machine(self) -> VirtualMachine:
        return self._entry.machine

    def _known(self) -> list[int]:
        configured = self._machine.config.vcpus
        if len(configured) != len(self._ids):
            self._ids += [vcpu.id for vcpu in configured if vcpu.id not in self._ids]
        return self._ids

    def vcpus(self) -> int:
        return len(self._known())

    def index_of(self, vcpu: int) -> int:
        """The index of a KVM vCPU id."""
        return self._known().index(vcpu)

    def ids_of(self, indices: Iterable[int]) -> frozenset[int]:
        """The KVM vCPU ids of indices."""
        known = self._known()
        return frozenset(known[index] for index in indices)

    def max_gfn(self) -> int:
        slots = self._machine.memory_slots.known
        if slots is not self._slots:
            self._slots = slots
            self._max_gfn = max((spec.gfn + spec.pages for spec in slots.values()), default=0)
        return self._max_gfn

    def has_memory(self, gfn: int) -> bool:
        return self._machine.memory_slots.known.holding(gfn) is not None

    def spp(self) -> bool:
        machine = self._machine
        host = machine.config.host
        return machine.spp_active or (host.supports_spp and not host.nested)

    @_query
    def registers(self, vcpu: int, msrs: Sequence[int]) -> Registers:
        # Every event shows them, and they are seldom others than those of the last one.
        id, wanted = self._known()[vcpu], tuple(msrs)
        version = self._machine.nested.registers_version(id)
        known = self._registers.get(id)
        if known is None or known[0] != wanted or known[1] != version:
            known = self._registers[id] = wanted, version, Registers(*registers_of(self._machine, id, wanted))
        return known[2]

    def shown(self, vcpu: int) -> Registers:
        try:
            return self.registers(vcpu, EVENT_MSRS)
        except Refused:
            return UNKNOWN_REGISTERS

    @_query
    def cpuid(self, vcpu: int, function: int, index: int) -> tuple[int, int, int, int]:
        leaves = self._machine.nested.cpuid(self._known()[vcpu])
        fitting = [leaf for leaf in leaves if leaf.function == function]
        # Bit 0 of the flags: the index matters.
        leaf = next((leaf for leaf in fitting if not leaf.flags & 1 or leaf.index == index), None)
        if leaf is None:
            raise Refused(ENOENT)
        return leaf.eax, leaf.ebx, leaf.ecx, leaf.edx

    @_query
    def read(self, gpa: int, size: int) -> bytes:
        found = self._machine.read_in_page(gpa, size)
        if found is None:
            raise Refused(ENOENT)
        return found

    @_query
    def translate(self, vcpu: int, gva: int) -> int:
        try:
            return self._machine.guest_walk(gva, 1, self._known()[vcpu]).gpa
        except InvalidValue as error:
            if error.field != "gva":  # a vCPU in guest mode: its linear addresses are another guest's
                raise Refused(EOPNOTSUPP) from None
            return NO_ADDRESS

    @_query
    def page(self, gfn: int) -> PageRights:
        [found] = self._machine.page_access.read((gfn,))
        return PageRights(found.rights, found.bitmap)

    def resting(self) -> bool:
        return not self._entry.lock.held

    # What is done to it

    async def make(self, change: Change) -> int:
        """Make a change and commit it; 0 or its error, and then nothing or, of pages, the others have changed."""
        try:
            return await self._make(change)
        except _FAILURES as error:
            return _errno_of(error)

    async def _make(self, change: Change) -> int:
        pages = change.then if isinstance(change, SwitchSppOn) else change if isinstance(change, SetPages) else None
        if pages is not None and len(self.restricted) + len(pages.pages) > MAX_RESTRICTED:
            return ENOMEM
        async with self._entry.mutation(()) as mutation:
            machine = mutation.machine
            if isinstance(change, WriteMemory):
                machine.write_memory(change.gpa, change.data)
                return 0
            if isinstance(change, SwitchSppOn) and not machine.spp_active:
                await maybe_in_thread(False, machine.enable_spp)
            if pages is None:
                return 0
            errno, applied = await maybe_in_thread(len(pages.pages) <= _INLINE_PAGES, _set_pages, machine, pages)
            if applied:
                self._entry.events.note("page-access", pages_set(list(applied)))
        self._note(applied)
        return errno

    def _note(self, applied: dict[int, PageRights]) -> None:
        for gfn, page in applied.items():
            if page == _OPEN:
                self.restricted.pop(gfn, None)
            else:
                self.restricted[gfn] = page

    async def give_back(self) -> None:
        """Lift what the tool has restricted, some at a time. Raises what a mutation does; the rest is still to lift."""
        while self.restricted and not self._entry.gone:
            some = sorted(self.restricted)[:MAX_ENTRIES]
            async with self._entry.mutation((), patient=True) as mutation:
                known = mutation.machine.memory_slots.known
                lifted = [AccessChange(gfn, ALL_RIGHTS) for gfn in some if known.holding(gfn) is not None]
                if lifted:
                    access = mutation.machine.page_access
                    await maybe_in_thread(len(lifted) <= _INLINE_PAGES, access.set, lifted, "apply-all")
                    self._entry.events.note("page-access", pages_set([item.gfn for item in lifted]))
            for gfn in some:
                self.restricted.pop(gfn, None)


def _set_pages(machine: VirtualMachine, wanted: SetPages) -> tuple[int, dict[int, PageRights]]:
    """The first error, 0 for none, and what each page has now that was set.

    A page without a slot is passed over, as the kernel forgets what is said of one.
    """
    known = machine.memory_slots.known
    errors: list[int] = []
    entries: list[AccessChange] = []
    places: list[int] = []
    for place, page in enumerate(wanted.pages):
        wrong = page.rights is None and page.bitmap is None
        errors.append(EINVAL if wrong else 0)
        if wrong and wanted.first_ends:
            break
        if not wrong and known.holding(page.gfn) is not None:
            entries.append(AccessChange(page.gfn, page.rights, page.bitmap))
            places.append(place)
    applied = []
    if entries:
        mode = "stop-at-first" if wanted.first_ends else "apply-all"
        for place, result in zip(places, machine.page_access.set(entries, mode), strict=True):
            if result.outcome == "applied":
                applied.append(result.gfn)
            elif result.outcome == "refused":
                errors[place] = EINVAL
    pages = machine.page_access.read(applied) if applied else ()
    found = {page.gfn: PageRights(page.rights, page.bitmap) for page in pages}
    return next((errno for errno in errors if errno), 0), found


def described(change: Change) -> dict[str, Any]:
    """A change as the audit log tells it."""
    if isinstance(change, WriteMemory):
        return {"command": "WRITE_PHYSICAL", "gpa": hex(change.gpa), "size": len(change.data)}
    pages = change.then if isinstance(change, SwitchSppOn) else change
    if pages is None:
        return {"command": "CONTROL_SPP"}
    first = pages.pages[0].gfn if pages.pages else 0
    return {"command": pages.command, "pages": len(pages.pages), "first_gfn": hex(first)}
