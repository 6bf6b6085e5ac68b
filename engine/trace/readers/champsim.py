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
# In the order in which an instruction uses them: it loads, then it stores.
_MEMORY = (4, 5, 6, 7, 2, 3)
_ACCESSES = np.array([acc.READ] * 4 + [acc.WRITE] * 2, dtype=np.uint8)
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
        buffer = ChunkBuffer((), INSTRUCTIONS * len(_MEMORY))
        buffer.fill("size", np.full(buffer.capacity, self._size, dtype=np.uint64))
        body = np.zeros((INSTRUCTIONS, _WORDS), dtype=np.uint64)
        target = body.data.cast("B")
        done = records = 0
        while True:
            stored = read_into(self._source, target)
            count, rest = divmod(stored, RECORD_BYTES)
            memory = body[:count, _MEMORY]
            used = memory != 0
            addresses = memory[used]
            if len(addresses):
                buffer.fill("gpa", addresses)
                buffer.fill("access", np.broadcast_to(_ACCESSES, used.shape)[used])
                yield buffer.chunk(len(addresses), {"pc": np.repeat(body[:count, 0], used.sum(axis=1))})
            done, records = done + count, records + len(addresses)
            if rest:
                rule = f"the body ends {rest} bytes into instruction {done} of {RECORD_BYTES} bytes"
                raise TraceError(rule, index=records, field="body")
            if stored < len(target):
                return
