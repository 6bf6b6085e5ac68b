"""Method (a): look up the first and the last byte of each write in a bitmap of protected sub-pages, with numpy."""

from __future__ import annotations

import numpy as np

from bench.data import CHUNK, RAM_BYTES, Answer, Policy, Trace

SUBPAGE_SHIFT = 7


class NumpyCheck:
    """Blocks of 64 Ki records, every intermediate in a buffer made beforehand. Counts violations and nothing else.

    It is given what suits numpy best: separate contiguous columns rather than 16-byte records.
    """

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self._gpa, self._size = trace.gpa, trace.size
        # One more entry, never protected: where addresses beyond RAM end up by clipping.
        self._denied = np.zeros((RAM_BYTES >> SUBPAGE_SHIFT) + 1, dtype=np.bool_)
        for first, count, mask in policy.pages:
            bits = np.array([not mask >> i & 1 for i in range(32)], dtype=np.bool_)
            self._denied[first * 32 : (first + count) * 32] = np.tile(bits, count)
        self._last = np.empty(CHUNK, dtype=np.uint64)
        self._index = np.empty(CHUNK, dtype=np.int64)
        self._hit = np.empty(CHUNK, dtype=np.bool_)
        self._hit_last = np.empty(CHUNK, dtype=np.bool_)
        self.violations = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        count = 0
        one, shift = np.uint64(1), np.uint64(SUBPAGE_SHIFT)
        for start in range(0, len(self._gpa), CHUNK):
            gpa, size = self._gpa[start : start + CHUNK], self._size[start : start + CHUNK]
            n = len(gpa)
            last, index, hit, hit_last = self._last[:n], self._index[:n], self._hit[:n], self._hit_last[:n]
            np.right_shift(gpa, shift, out=index.view(np.uint64))
            np.take(self._denied, index, out=hit, mode="clip")
            np.add(gpa, size, out=last)
            np.subtract(last, one, out=last)
            np.right_shift(last, shift, out=index.view(np.uint64))
            np.take(self._denied, index, out=hit_last, mode="clip")
            np.logical_or(hit, hit_last, out=hit)
            count += int(np.count_nonzero(hit))
        self.violations = count

    def answer(self) -> Answer:
        return Answer(self.violations)
