"""A machine and the model side by side: everything that can be read of the one is what the other says."""

from __future__ import annotations

from engine.machine import VirtualMachine
from engine.machine.page_access import text_of
from tests.engine.builders import assert_sound, maps
from tests.property.model import PAGE, Model

LAYERS = ("effective", "set", "protected", "granted")


def compare(vm: VirtualMachine, model: Model) -> None:
    """Everything that can be read of a machine is what the model says."""
    assert {s.slot: (s.gfn, s.pages, s.read_only, s.log_dirty) for s in vm.slots()} == {
        number: (slot.gfn, slot.pages, slot.read_only, slot.log_dirty) for number, slot in model.slots.items()
    }
    compare_dirty(vm, model)
    for slot in model.slots.values():
        for layer in LAYERS:
            wanted = [model.mask(gfn, layer) for gfn in slot.gfns()]
            assert maps(vm, slot.gfn, slot.pages, layer) == wanted, layer
        rights = [(text_of(page.rights).replace("-", ""), page.bitmap) for page in vm.page_access.read(slot.gfns())]
        assert rights == [model.page_access(gfn) for gfn in slot.gfns()]
        size = slot.pages * PAGE
        assert vm.read_memory(slot.gfn * PAGE, size) == model.read(slot.gfn * PAGE, size)
    assert_sound(vm)


def compare_dirty(vm: VirtualMachine, model: Model) -> None:
    now = vm.dirty.tracking()
    assert (now.tracking, now.method) == (model.tracking, model.method)
    found = vm.dirty.pages()
    assert dict(zip(found.gfns.tolist(), found.maps.tolist(), strict=True)) == {
        **dict.fromkeys(model.log, 0),
        **model.by_page(model.written),
    }
    assert set(found.gfns[found.logged].tolist()) == model.log
    waiting = vm.dirty.outstanding()
    known = (
        {}
        if waiting is None
        else {waiting.harvest: dict(zip(waiting.gfns.tolist(), waiting.maps.tolist(), strict=True))}
    )
    assert known == model.harvests
