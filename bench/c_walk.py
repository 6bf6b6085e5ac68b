"""Methods (b) and (d): the C loop and the read limit, built from ``walk.c`` for this machine."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from bench.data import RAM_BYTES, Answer, Policy, Trace, hash_of

SOURCE = Path(__file__).with_name("walk.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-Wall", "-Wextra")


class Totals(ctypes.Structure):
    """``struct totals``."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("violations", "page_granular", "mmio", "mapped", "walks"))


@cache
def library() -> ctypes.CDLL:
    """Build and load it. Raises ``CalledProcessError`` if the compiler refuses, ``FileNotFoundError`` without one."""
    with tempfile.TemporaryDirectory(prefix="subpage-bench-") as folder:
        built = Path(folder) / "walk.so"
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", str(built), str(SOURCE)], check=True)
        lib = ctypes.CDLL(str(built))
    pointer, u64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    lib.machine_new.restype, lib.machine_new.argtypes = pointer, [u64]
    lib.machine_free.restype, lib.machine_free.argtypes = None, [pointer]
    lib.machine_reset.restype, lib.machine_reset.argtypes = None, [pointer]
    lib.machine_protect.restype, lib.machine_protect.argtypes = None, [pointer, u64, u32]
    lib.machine_check.restype = None
    lib.machine_check.argtypes = [pointer, pointer, ctypes.c_size_t, pointer, ctypes.c_size_t, ctypes.POINTER(Totals)]
    lib.sum_words.restype, lib.sum_words.argtypes = u64, [pointer, ctypes.c_size_t]
    return lib


class CWalk:
    """(b) EPT and SPPT walk behind a software TLB of 4096 entries. Every ``run`` starts with an empty EPT."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self._lib = library()
        self._records = trace.records
        self._machine = self._lib.machine_new(RAM_BYTES)
        for first, count, mask in policy.pages:
            for gfn in range(first, first + count):
                self._lib.machine_protect(self._machine, gfn, mask)
        self._positions = np.zeros(1 << 20, dtype=np.uint64)
        self.totals = Totals()

    def prepare(self) -> None:
        self._lib.machine_reset(self._machine)

    def run(self) -> None:
        self._lib.machine_check(
            self._machine,
            self._records.ctypes.data,
            len(self._records),
            self._positions.ctypes.data,
            len(self._positions),
            ctypes.byref(self.totals),
        )

    def answer(self) -> Answer:
        violations = self.totals.violations
        return Answer(violations, self.totals.page_granular, hash_of(self._positions[:violations]))

    def close(self) -> None:
        self._lib.machine_free(self._machine)


class CSum:
    """(d) The sum of both words of every record: what reading the array costs."""

    def __init__(self, trace: Trace) -> None:
        self._lib = library()
        self._records = trace.records
        self.total = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        self.total = self._lib.sum_words(self._records.ctypes.data, len(self._records))

    def check(self) -> bool:
        return self.total == int(self._records.sum(dtype=np.uint64))
