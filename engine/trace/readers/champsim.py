"""``champsim``: the instructions of ChampSim's tracers, 64 bytes each (``inc/trace_instruction.h``, ``input_instr``).

u64 ip, u8 is_branch, u8 branch_taken, u8[2] destination and u8[4] source registers, u64[2] destination and u64[4]
source memory; 0 is no memory. There are no sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.columns import ChunkBuffer, TraceChunk
from engine.trace.readers.base import Source, TraceReader, read_into
from engine.trace.readers.tool_format import ToolFormat

RECORD_BYTES = 64
_WORDS = RECORD_BYTES // 8
_MOST = 6  # accesses of an instruction
# In the order in which an instruction uses them: it loads, then it stores. Two places of eight stay empty.
_ACCESSES = np.array([acc.READ] * 4 + [acc.WRITE] * 4, dtype=np.uint8)
# Instructions read at a time: what they become at most is 1.5 MiB.
INSTRUCTIONS = 1 << 14


class ChampsimReader(TraceReader):
    """Reads instructions; each gives its loads and its stores."""

    def __init__(self, source: Source, carry: Sequence[str], tool: ToolFormat) -> None:
        super().__init__(source, carry)
        for name in carry:
            if name not in tool.columns:
                raise TraceError(f"champsim has no column {name} to carry", field="carry", value=name)
        assert tool.assumed_size is not None
        self._size = tool.assumed_size
        self.taken = tool.taken({}, ())

    def _chunks(self) -> Iterator[TraceChunk]:
        buffer = ChunkBuffer((), INSTRUCTIONS * _MOST)
        buffer.fill("size", np.full(buffer.capacity, self._size, dtype=np.uint64))
        body = np.zeros((INSTRUCTIONS, _WORDS), dtype=np.uint64)
        memory = np.zeros_like(body)
        target = body.data.cast("B")
        done = records = 0
        while True:
            stored = read_into(self._source, target)
            count, rest = divmod(stored, RECORD_BYTES)
            memory[:count, 0:4] = body[:count, 4:8]
            memory[:count, 4:6] = body[:count, 2:4]
            used = np.flatnonzero(memory[:count])
            if len(used):
                buffer.fill("gpa", memory.reshape(-1)[used])
                buffer.fill("access", _ACCESSES[used & 7])
                yield buffer.chunk(len(used), {"pc": body[used >> 3, 0]})
            done, records = done + count, records + len(used)
            if rest:
                rule = f"the body ends {rest} bytes into instruction {done} of {RECORD_BYTES} bytes"
                raise TraceError(rule, index=records, field="body")
            if stored < len(target):
                return
