"""A change is made on the state its input was checked against, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.errors import Busy
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.state.config import VmConfig

SLOT = SlotSpec(0, 0, 1 << 20)

CHANGES: dict[str, Callable[[VirtualMachine], object]] = {
    "new slot": lambda vm: vm.set_slot(SlotSpec(2, 1 << 21, 1 << 20)),
    "deleted slot": lambda vm: vm.delete_slot(0),
    "maps": lambda vm: vm.set_subpages([SubpageRange(1, 1, 0)]),
    "protection": lambda vm: vm.protect("p", [ProtectedObject("o", 0x1000, 8)]),
    "memory": lambda vm: vm.write_memory(0, b"x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_that_another_overtook_is_refused(
    change: Callable[[VirtualMachine], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = VirtualMachine.create(VmConfig(), [SLOT], spp=True)
    overtaking = SlotSpec(1, 1 << 22, 1 << 20)
    acquire = vm.state._acquire

    def overtaken() -> None:
        monkeypatch.setattr(vm.state, "_acquire", acquire)
        vm.set_slot(overtaking)
        acquire()

    monkeypatch.setattr(vm.state, "_acquire", overtaken)
    with pytest.raises(Busy):
        change(vm)
    assert vm.slots() == (SLOT, overtaking)
    assert not vm.protections() and vm.subpages(1, 1).tolist() == [0xFFFF_FFFF]
    change(vm)
