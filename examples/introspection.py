"""Introspection: watch the objects of a real kernel while it boots, and tell hits from neighbours' noise.

A tool protects what a rootkit would overwrite, lets every write through (`on_violation=allow`, KVMI's "continue") and
reads who wrote what. Writes to the same 128 bytes that touch no byte of an object are told apart as collateral.

Run: `.venv/bin/python examples/introspection.py [URL]`; without a URL it starts a service of its own.
"""

import sys
from collections import Counter

from connect import BOOT, POLICY, connect, guest

# What the 16 million writes of the boot come to, counted beforehand by other means (tests/data/ground-truth.json).
VIOLATIONS = 2550
WITH_WHOLE_PAGES = 17607
ONLY_NEIGHBOURS = {"modprobe_path", "init_nsproxy"}


def main(url: str | None) -> None:
    with connect(url) as client, guest(client) as vm:
        vm.protect(POLICY)
        trace = vm.replay(BOOT, on_violation="allow", carry="pc_low32")
        exits = list(trace.exits())

    writers = {name: Counter[int]() for name in trace.by_object}
    for item in exits:
        for name in item["objects"]:
            writers[name][item["pc_low32"]] += 1
    print(f"{'object':24} {'hits':>6} {'collateral':>10}  most often written from")
    for name, hits in trace.by_object.items():
        pcs = ", ".join(f"{pc:#x} ({count})" for pc, count in writers[name].most_common(2))
        print(f"{name:24} {hits['violations']:6} {hits['collateral']:10}  {pcs}")
    print(f"{len(exits)} events; whole pages would have made {trace.page_granular_violations}")

    assert (trace.violations, trace.page_granular_violations) == (VIOLATIONS, WITH_WHOLE_PAGES)
    assert len(exits) == VIOLATIONS and all(item["resolution"] == "violation" for item in exits)
    for name, hits in trace.by_object.items():
        assert sum(writers[name].values()) == hits["violations"]
        if name in ONLY_NEIGHBOURS:
            assert hits["violations"] == hits["collateral"] > 0, name
    assert sum(hits["violations"] for hits in trace.by_object.values()) >= VIOLATIONS


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
