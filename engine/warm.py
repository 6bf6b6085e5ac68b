"""Compile every kernel once, so that the first request does not: ``python -m engine.warm``."""

from __future__ import annotations

import numpy as np

from engine.access import AccessChange
from engine.config import VmConfig
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest


def warm() -> None:
    """Drive each operation once on a machine of one page-table's size."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 22)], spp=True)
    vm.set_subpages([SubpageRange(1, 2, 0xFFFF_0000), SubpageRange(3, 1, np.array([0], dtype=np.uint32))])
    vm.protect("warm", [ProtectedObject("object", 0x4010, 0x100)])
    vm.write_memory(0x5000, b"warm")
    vm.read_memory(0x5000, 4)
    vm.subpages(1, 4)
    vm.walk(0x4010)
    vm.access(AccessRequest(0x4010, on_violation="grant"))
    records = np.array([[0x4010, 8 | 1 << 16], [0x6000, 8 | 1 << 16]], dtype=np.uint64)
    with vm.replay(ReplayOptions()) as replay:
        replay.feed(TraceChunk(records, None, {}))
        replay.finish().exit_columns.objects()
    vm.vcpus.vm_entry(0)
    vm.vcpus.invept(0, 2, 0)
    vm.vcpus.invvpid(0, 2, 0, 0)
    vm.unprotect("warm")
    vm.page_access.set([AccessChange(7, rights=5)])
    vm.page_access.read([7])
    vm.dirty.track("page", "pml")
    vm.set_slot(SlotSpec(0, 0, 1 << 22, log_dirty=True))
    vm.dirty.track("subpage")
    vm.write_memory(0x5000, b"warm")
    vm.dirty.pages()
    vm.dirty.acknowledge(vm.dirty.harvest().harvest)
    vm.dirty.take_log(0)
    vm.set_slot(SlotSpec(0, 1 << 22, 1 << 22))
    vm.delete_slot(0)
    vm.counters()
    list(vm.changed_blocks())


if __name__ == "__main__":
    warm()
