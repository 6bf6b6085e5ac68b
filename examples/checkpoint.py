"""Checkpoint: copy what changed between two points of time, by 128-byte sub-pages instead of whole pages.

Twelve million writes of a real guest (find, sort, gzip, sha256sum, awk) in twelve steps. After each, a checkpointer
harvests what is dirty, would copy that, and acknowledges. The same figures are counted from the trace itself.

Run: `.venv/bin/python examples/checkpoint.py [URL]`; without a URL it starts a service of its own.
"""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from connect import USER, connect, guest

STEPS = 12
RAM_BYTES = 1 << 30

# Bytes to copy over all steps.
BY_PAGE = 4_915_200
BY_SUBPAGE = 2_512_256


def counted(trace: pa.Table) -> tuple[int, int]:
    """Bytes of the distinct pages and sub-pages that a trace writes in RAM."""
    first = trace["gpa"].to_numpy()
    last = first + trace["size"].to_numpy() - np.uint64(1)
    touched = np.concatenate([first, last])[np.tile(first < RAM_BYTES, 2)]
    return len(np.unique(touched >> 12)) * 4096, len(np.unique(touched >> 7)) * 128


def main(url: str | None) -> None:
    trace = pq.read_table(USER, columns=["gpa", "size"])
    records = len(trace) // STEPS
    pages = subpages = 0
    with connect(url) as client, guest(client) as vm:
        vm.call("putDirty", json={"tracking": "subpage"})
        print(f"{'step':>4} {'pages, KiB':>12} {'sub-pages, KiB':>15}")
        for step in range(STEPS):
            part = trace.slice(step * records, records)
            vm.replay(part)
            harvest = vm.call("harvestDirty").json()
            vm.call("acknowledgeDirty", json={"harvest": harvest["harvest"]})
            found = harvest["dirty_bytes_page_granular"], harvest["dirty_bytes_subpage"]
            print(f"{step + 1:4} {found[0] / 1024:12.0f} {found[1] / 1024:15.1f}")
            assert found == counted(part)
            pages, subpages = pages + found[0], subpages + found[1]
        assert not list(vm.dirty())
    print(f"{pages - subpages} bytes saved: {subpages} instead of {pages}, {pages / subpages:.1f} times less")
    assert (pages, subpages) == (BY_PAGE, BY_SUBPAGE)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
