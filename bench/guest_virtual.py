"""Method (j): the engine's replay of the same trace by the guest's linear addresses, through its page tables.

A direct map of RAM in pages of 4 KBytes leads each address back to where it was recorded, so the answers are the same.
"""

from __future__ import annotations

import numpy as np

from bench.data import CHUNK, RAM_BYTES, Policy, Trace
from bench.replay import EngineReplay
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions

DIRECT_MAP = 0xFFFF_8880_0000_0000
PAGE, ENTRIES = 4096, 512
PAGES = RAM_BYTES // PAGE
TABLES = PAGES // ENTRIES
# Behind RAM: a page table for every 2 MBytes of it, then the directory, then what names the directory.
BASE = RAM_BYTES
DIRECTORY = BASE + TABLES * PAGE
POINTERS = DIRECTORY + PAGE
FLAGS = 3  # present, writable


def machine(policy: Policy) -> VirtualMachine:
    """A new machine with the direct map, for a vCPU as it is made: four levels, CR3 0."""
    assert TABLES == ENTRIES, "one directory names all tables"
    slots = [SlotSpec(0, 0, RAM_BYTES), SlotSpec(1, BASE, (TABLES + 2) * PAGE)]
    vm = VirtualMachine.create(VmConfig(), slots, spp=True)
    leaves = (np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE)) | np.uint64(FLAGS)
    vm.write_memory(BASE, leaves.tobytes())
    vm.write_memory(DIRECTORY, ((np.arange(TABLES, dtype=np.uint64) * PAGE + BASE) | FLAGS).tobytes())
    vm.write_memory(POINTERS, (DIRECTORY | FLAGS).to_bytes(8, "little"))
    vm.write_memory((DIRECT_MAP >> 39 & ENTRIES - 1) * 8, (POINTERS | FLAGS).to_bytes(8, "little"))
    vm.protect(policy.name, [ProtectedObject(o["name"], o["gpa"], o["size"]) for o in policy.objects])
    return vm


class GuestVirtualReplay(EngineReplay):
    """A whole trace as one transaction; the cache of translations begins empty. Making the machine is not timed."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        super().__init__(trace, policy)
        self._records = trace.records.copy()
        self._records[:, 0] += np.uint64(DIRECT_MAP)

    def prepare(self) -> None:
        self._vm = machine(self._policy)

    def run(self) -> None:
        assert self._vm is not None
        with self._vm.replay(ReplayOptions(address="gva")) as replay:
            for start in range(0, len(self._records), CHUNK):
                replay.feed(TraceChunk(self._records[start : start + CHUNK], None, {}))
            self.result = replay.finish()
