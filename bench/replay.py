"""Method (e): the engine itself, in this process, on one core, with everything a replay does."""

from __future__ import annotations

from bench.data import CHUNK, RAM_BYTES, Answer, Policy, Trace, hash_of
from engine.arch.access import WRITE
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.columns import Columns, TraceChunk
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions


def machine(policy: Policy, ram_bytes: int = RAM_BYTES) -> VirtualMachine:
    """A new machine with RAM at 0 and the policy's objects protected; no page is mapped yet."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, ram_bytes)], spp=True)
    vm.protect(policy.name, [ProtectedObject(o["name"], o["gpa"], o["size"]) for o in policy.objects])
    return vm


class EngineReplay:
    """A whole trace as one transaction, on a machine that has seen nothing. Making the machine is not timed."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self._records, self._policy = trace.records, policy
        self._vm: VirtualMachine | None = None
        self.result: TraceResult | None = None

    def prepare(self) -> None:
        self._vm = machine(self._policy)

    def run(self) -> None:
        assert self._vm is not None
        with self._vm.replay(ReplayOptions()) as replay:
            for start in range(0, len(self._records), CHUNK):
                replay.feed(self._chunk(start, start + CHUNK))
            self.result = replay.finish()

    def _chunk(self, start: int, end: int) -> TraceChunk:
        return TraceChunk(self._records[start:end], None, {})

    def answer(self) -> Answer:
        result = self.result
        assert result is not None
        indices = hash_of(result.exit_columns.columns["index"])
        return Answer(result.violations, result.page_granular_violations, indices)


class ColumnReplay(EngineReplay):
    """The same from columns as Arrow and Parquet bodies have them, 9 bytes a record."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        super().__init__(trace, policy)
        self._gpa, self._size = trace.gpa, trace.size

    def _chunk(self, start: int, end: int) -> TraceChunk:
        return TraceChunk(None, None, {}, columns=Columns(self._gpa[start:end], self._size[start:end], WRITE << 16))
