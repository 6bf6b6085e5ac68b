"""By what the records of ChampSim are known: no address is one, but their flags and gaps are of no other body."""

from __future__ import annotations

import numpy as np

RECORD_BYTES = 64
# Fewer prove nothing.
_LEAST = 4
_MOST = 64


def is_champsim(head: bytes | bytearray | memoryview) -> bool:
    """Whether a body begins with several of them."""
    count = min(len(head) // RECORD_BYTES, _MOST)
    if count < _LEAST:
        return False
    records = np.frombuffer(bytes(head[: count * RECORD_BYTES]), dtype=np.uint8).reshape(count, RECORD_BYTES)
    words = records.view("<u8")
    flags, memory = records[:, 8:10], words[:, 2:]
    # A branch is taken only if it is one, and an instruction has an address; no instruction uses all six places.
    plain = (flags <= 1).all(axis=1) & (flags[:, 1] <= flags[:, 0]) & (words[:, 0] != 0) & (memory == 0).any(axis=1)
    return bool(plain.all() and (memory != 0).any() and records[:, 10:16].any())
