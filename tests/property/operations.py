"""Random operations, made from any source of integers, and done to a machine and to the model alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import AccessRequest, SubpageRange, VirtualMachine
from engine.trace.results import TraceResult
from tests.engine.builders import exits, replay
from tests.property.model import PAGE, WRITE, Model, Tally

Draw = Callable[[int, int], int]
Operation = tuple[Any, ...]

# Pages around the end of a 2-MByte region, so that tables are shared and not.
FIRST, LAST = 500, 523
KINDS = ("set_slot", "delete_slot", "set_map", "protect", "unprotect", "write", "replay", "access")
WEIGHTED = (*KINDS, "set_map", "protect", "replay", "replay", "replay", "access")
ON_VIOLATION = ("skip", "stop", "allow", "grant")
MASKS = (0, 0xFFFF_FFFF, 0xFFFF_FFFE, 0x7FFF_FFFF, 0x0F0F_F00F, 1)
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
            return kind, draw(0, 2), draw(FIRST, LAST), (4, 4, 9)[draw(0, 2)], draw(0, 4) == 0
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
        case _:
            return "access", address(draw), bytes([draw(1, 255)]) * (1, 8, 300)[draw(0, 2)], ON_VIOLATION[draw(0, 3)]


def first_slots() -> list[Operation]:
    """Two slots side by side, with the end of the region in the second."""
    return [("set_slot", 0, FIRST, 9, False), ("set_slot", 1, FIRST + 9, 4, False)]


def do(vm: VirtualMachine, step: Operation) -> Any:
    """Do an operation to a machine; an error of the engine is the answer."""
    try:
        match step:
            case ("set_slot", slot, gfn, pages, read_only):
                return vm.set_slot(SlotSpec(slot, gfn * PAGE, pages * PAGE, read_only))
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
    except EngineError as error:
        return error
    raise AssertionError(step)


def foretell(model: Model, step: Operation) -> Tally | None:
    """Do an operation to the model; raises Refused."""
    match step:
        case ("set_slot", slot, gfn, pages, read_only):
            model.set_slot(slot, gfn, pages, read_only)
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
    return None


def foretell_access(model: Model, gpa: int, data: bytes, on_violation: str) -> Tally:
    tally = model.replay([(gpa, len(data), WRITE)], on_violation)
    gfns = range(gpa // PAGE, (gpa + len(data) - 1) // PAGE + 1)
    slots = [model.slot_of(gfn) for gfn in gfns]
    all_ram = all(slot is not None and not slot.read_only for slot in slots)
    if all_ram and (not tally.violations or on_violation in ("allow", "grant")):
        model._store(gpa, data)
    return tally


def agree(answer: Any, tally: Tally | None) -> None:
    """The machine's answer to a replay or an access is the model's."""
    if tally is None:
        assert answer is None
        return
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
