"""Random operations, made from any source of integers, and done to a machine and to the model alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.machine.page_access import AccessChange
from engine.trace.results import TraceResult
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    exits,
    replay,
)
from tests.property.model import PAGE, WRITE, Model, Tally

Draw = Callable[[int, int], int]
Operation = tuple[Any, ...]

# Pages around the end of a 2-MByte region, so that tables are shared and not.
FIRST, LAST = 500, 523
KINDS = ("set_slot", "delete_slot", "set_map", "protect", "unprotect", "write", "replay", "access")
DIRTY = ("track", "harvest", "acknowledge", "take_log", "page_access", "host")
# Slots come often, so that the rest has something to work on.
OFTEN = ("set_slot", "set_slot", "set_map", "protect", "replay", "replay", "replay", "replay", "access", "harvest")
WEIGHTED = (*KINDS, *DIRTY, *OFTEN, "acknowledge", "take_log", "host")
ON_VIOLATION = ("skip", "stop", "allow", "grant")
MASKS = (0, 0xFFFF_FFFF, 0xFFFF_FFFE, 0x7FFF_FFFF, 0x0F0F_F00F, 1)
REMAPS = ("remap-read-only", "remap-writable")
EVENTS = ("unmap", "write-protect", "age", "zap", "shrink", "split", "collapse", "migrate", *REMAPS)
TRACKING = ("off", "page", "subpage", "subpage")
RIGHTS = (None, "rwx", "rw", "r", "x", "")
SIZES = (1, 8, 8, 100, 300, 5000)


def address(draw: Draw) -> int:
    offset = (0, 8, 120, 124, 2048, 4090, 4095)[draw(0, 6)]
    return draw(FIRST, LAST) * PAGE + offset


def rows(draw: Draw, count: int) -> list[tuple[int, int, int]]:
    return [(address(draw), SIZES[draw(0, 5)], (0, 1, 1, 1, 2)[draw(0, 4)]) for _ in range(count)]


def operation(draw: Draw) -> Operation:
    """One operation as plain values."""
    kind = WEIGHTED[draw(0, len(WEIGHTED) - 1)]
    match kind:
        case "set_slot":
            return kind, draw(0, 2), draw(FIRST, LAST), (9, 9, 4)[draw(0, 2)], draw(0, 9) == 0, draw(0, 1) == 0
        case "delete_slot":
            return kind, draw(0, 2)
        case "set_map":
            return kind, draw(FIRST, LAST), draw(1, 4), MASKS[draw(0, 5)]
        case "protect":
            objects = [("abc"[draw(0, 2)], address(draw), (1, 8, 200, 4096)[draw(0, 3)]) for _ in range(draw(1, 2))]
            return kind, "pq"[draw(0, 1)], objects
        case "unprotect":
            return kind, "pq"[draw(0, 1)]
        case "write":
            return kind, address(draw), bytes([draw(1, 255)]) * (1, 7, 5000)[draw(0, 2)]
        case "replay":
            return kind, rows(draw, draw(1, 8)), ON_VIOLATION[draw(0, 3)]
        case "track":
            return kind, TRACKING[draw(0, 3)], ("write-protect", "pml")[draw(0, 1)]
        case "harvest":
            return (kind,)
        case "acknowledge":
            return kind, draw(-2, 0)
        case "take_log":
            return kind, draw(0, 2)
        case "host":
            everywhere = draw(0, 9) == 0
            return kind, EVENTS[draw(0, 9)], None if everywhere else draw(FIRST, LAST), draw(1, 4)
        case "page_access":
            entries = [
                (draw(FIRST, LAST), RIGHTS[draw(0, 5)], (None, None, 0xFFFF_FFFF, 0, 0x0F0F_F00F)[draw(0, 4)])
                for _ in range(draw(1, 3))
            ]
            return kind, entries, ("atomic", "apply-all", "stop-at-first")[draw(0, 2)]
        case _:
            return "access", address(draw), bytes([draw(1, 255)]) * (1, 8, 300)[draw(0, 2)], ON_VIOLATION[draw(0, 3)]


def first_slots() -> list[Operation]:
    """Two slots side by side, with the end of the region in the second."""
    return [("set_slot", 0, FIRST, 9, False, False), ("set_slot", 1, FIRST + 9, 4, False, True)]


def do(vm: VirtualMachine, step: Operation) -> Any:
    """Do an operation to a machine; an error of the engine is the answer."""
    try:
        match step:
            case ("set_slot", slot, gfn, pages, read_only, log_dirty):
                return vm.set_slot(SlotSpec(slot, gfn * PAGE, pages * PAGE, read_only, log_dirty=log_dirty))
            case ("delete_slot", slot):
                return vm.delete_slot(slot)
            case ("set_map", gfn, pages, mask):
                return vm.set_subpages([SubpageRange(gfn, pages, mask)])
            case ("protect", name, objects):
                vm.protect(name, [ProtectedObject(*item) for item in objects])
                return None
            case ("unprotect", name):
                return vm.unprotect(name)
            case ("write", gpa, data):
                return vm.write_memory(gpa, data)
            case ("replay", accesses, on_violation):
                return replay(vm, accesses, on_violation=on_violation)
            case ("access", gpa, data, on_violation):
                return vm.access(AccessRequest(gpa, len(data), data=data, on_violation=on_violation))
            case _:
                return do_more(vm, step)
    except EngineError as error:
        return error


def do_more(vm: VirtualMachine, step: Operation) -> Any:
    """The operations about what is dirty, and page access."""
    match step:
        case ("track", tracking, method):
            vm.dirty.track(tracking, method)
            return None
        case ("harvest",):
            taken = vm.dirty.harvest()
            return taken.harvest, dict(zip(taken.gfns.tolist(), taken.maps.tolist(), strict=True))
        case ("acknowledge", back):
            return vm.dirty.acknowledge(last_harvest(vm) + back)
        case ("take_log", slot):
            bitmap = int.from_bytes(vm.dirty.take_log(slot), "little")
            return {number for number in range(bitmap.bit_length()) if bitmap >> number & 1}
        case ("host", event, gfn, npages):
            vm.host_memory.event(event, gfn, None if gfn is None else npages)
            return None
        case ("page_access", entries, mode):
            changes = [AccessChange(gfn, rights_of(letters), bitmap) for gfn, letters, bitmap in entries]
            return [result.outcome for result in vm.page_access.set(changes, mode)]
    raise AssertionError(step)


def last_harvest(vm: VirtualMachine) -> int:
    return vm.counters()["dirty_harvests"]


def rights_of(letters: str | None) -> int | None:
    return None if letters is None else sum(1 << "rwx".index(letter) for letter in letters)


def foretell(model: Model, step: Operation) -> Any:
    """Do an operation to the model; raises Refused."""
    match step:
        case ("set_slot", slot, gfn, pages, read_only, log_dirty):
            model.set_slot(slot, gfn, pages, read_only, log_dirty)
        case ("delete_slot", slot):
            model.delete_slot(slot)
        case ("set_map", gfn, pages, mask):
            model.set_map(gfn, pages, mask)
        case ("protect", name, objects):
            model.protect(name, objects)
        case ("unprotect", name):
            model.unprotect(name)
        case ("write", gpa, data):
            model.write(gpa, data)
        case ("replay", accesses, on_violation):
            return model.replay(accesses, on_violation)
        case ("access", gpa, data, on_violation):
            return foretell_access(model, gpa, data, on_violation)
        case ("track", tracking, method):
            model.track(tracking, method)
        case ("harvest",):
            return model.harvest()
        case ("acknowledge", back):
            return model.acknowledge(model.harvested + back)
        case ("take_log", slot):
            return model.take_log(slot)
        case ("host", event, gfn, npages):
            model.host_event(event, gfn, npages)
        case ("page_access", entries, mode):
            return model.set_page_access(entries, mode)
    return None


def foretell_access(model: Model, gpa: int, data: bytes, on_violation: str) -> Tally:
    tally = model.replay([(gpa, len(data), WRITE)], on_violation)
    lands = not tally.violations or on_violation == "allow" or (on_violation == "grant" and tally.grants)
    if lands and model.may_store(gpa, len(data)):
        model._store(gpa, data)
    return tally


def agree(answer: Any, wanted: Any) -> None:
    """The machine's answer is the model's."""
    if isinstance(wanted, Tally):
        agree_on_accesses(answer, wanted)
    else:
        assert answer == wanted


def agree_on_accesses(answer: Any, tally: Tally) -> None:
    """The machine's answer to a replay or an access is the model's."""
    if not isinstance(answer, TraceResult):
        wanted = "violation" if tally.violations and not tally.mmio else "mmio" if tally.mmio else "completed"
        assert answer.resolution == wanted
        return
    assert (answer.records, answer.writes, answer.violations) == (tally.records, tally.writes, tally.violations)
    assert (answer.page_granular_violations, answer.mmio) == (tally.page_granular, tally.mmio)
    assert answer.stopped_at == tally.stopped_at
    assert exits(answer, "index", "gfn", "denied") == tally.violating
    for name, hits in answer.by_object.items():
        assert (hits.violations, hits.collateral) == (tally.hits[name], tally.collateral[name])
        assert hits.first_index == tally.first.get(name)
    assert set(tally.hits) <= set(answer.by_object)


small = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def drawing(data: st.DataObject) -> Draw:
    return lambda low, high: data.draw(st.integers(low, high))
