"""Method (h): resident memory of a 1 TiB guest with ten protected pages that replays a trace.

Run as a process of its own: ``python -m bench.large_guest`` prints the growth in bytes as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Policy, load_trace
from bench.memory import resident, status
from bench.replay import machine
from engine.trace.readers import open_trace
from engine.trace.session import ReplayOptions

TIB = 1 << 40
PAGES = 10
RECORDS = 4_000_000
PROTECTED = [TIB // PAGES * i // 4096 * 4096 + 0x5000 for i in range(PAGES)]


def measure() -> dict[str, int]:
    """Make the trace in a file, and replay it in a fresh process."""
    trace = load_trace("user", RECORDS).records.copy()
    every = slice(None, None, RECORDS // 1000)
    trace[every, 0] = np.resize(np.array(PROTECTED, dtype=np.uint64) + np.uint64(0x100), len(trace[every]))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(trace.tobytes())
        file.flush()
        output = subprocess.run(
            [sys.executable, "-m", "bench.large_guest", file.name], check=True, capture_output=True, text=True
        ).stdout
    result: dict[str, int] = json.loads(output)
    return result


def _replay(ram_bytes: int, policy: Policy, path: str) -> Any:
    vm = machine(policy, ram_bytes)
    with Path(path).open("rb") as source, vm.replay(ReplayOptions()) as replay:
        for chunk in open_trace("packed", source, record="record16"):
            replay.feed(chunk)
        return vm, replay.finish()


def main(path: str) -> None:
    """Load and warm everything with a small guest first, so that only what the large one needs is counted."""
    objects = [{"name": f"page{i}", "gpa": gpa, "size": 4096} for i, gpa in enumerate(PROTECTED)]
    small = Policy("small", [{"name": "page", "gpa": 0x1E0_2000, "size": 4096}], [])
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        with Path(path).open("rb") as source:
            file.write(source.read(16 * 100_000))
        file.flush()
        _replay(1 << 30, small, file.name)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    vm, result = _replay(TIB, Policy("large", objects, []), path)
    peak, after = status("VmHWM"), status("VmRSS")
    print(
        json.dumps(
            {
                "peak_growth_bytes": peak - before,
                "final_growth_bytes": after - before,
                "records": result.records,
                "violations": result.violations,
                "table_bytes": vm.counters()["memory_bytes"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
