"""Resident memory of protected pages, each measurement in a process of its own: ``python -m bench.memory PAGES``."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.data import CHUNK
from engine.cpu.frames import FRAME_SIZE
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.subpage_operations import SubpageRange
from engine.state.config import VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions


def bytes_of_pages(pages: int) -> float:
    """Bytes that each of so many protected pages takes beyond EPT and SPPT, each seen, bitmaps all different."""
    command = [sys.executable, "-m", "bench.memory", str(pages)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident() -> int:
    """Bytes that the process has in memory, after what can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes that a line of the process's status tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _protected(pages: int) -> VirtualMachine:
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 40)], spp=True)
    words = np.random.default_rng(pages).integers(0, 1 << 32, pages, dtype=np.uint32)
    vm.set_subpages([SubpageRange(0, pages, words)])
    # A store to each: only then are there tables for it.
    stores = np.empty((pages, 2), dtype=np.uint64)
    stores[:, 0] = np.arange(pages, dtype=np.uint64) << np.uint64(12)
    stores[:, 1] = np.uint64(8 | 1 << 16)
    with vm.replay(ReplayOptions(max_exit_records=0)) as replay:
        for at in range(0, pages, CHUNK):
            replay.feed(TraceChunk(stores[at : at + CHUNK].copy(), None, {}))
        replay.finish()
    return vm


def main(pages: int) -> None:
    """A small machine first, so that nothing but the pages is counted."""
    _protected(CHUNK)
    before = resident()
    vm = _protected(pages)
    grown = resident() - before
    counts = vm.counters()
    print((grown - FRAME_SIZE * (counts["frames_ept"] + counts["frames_sppt"])) / pages)


if __name__ == "__main__":
    main(int(sys.argv[1]))
