"""Many sequences, and the smallest of each that differs.

    python -m tests.differential --count 100000 --seed 1

The exit status is 0 if no sequence differed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.differential.search import difference, smallest
from tests.differential.sequences import drawn
from tests.differential.unsettled import unsettled


def main() -> int:
    """Run the sequences ``first`` to ``first + count`` of a seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many sequences")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--most", type=int, default=20, help="stop after so many that differ")
    args = parser.parse_args()
    begun, differing, calls, known = time.monotonic(), 0, 0, Counter[str]()
    for index in range(args.first, args.first + args.count):
        world, sequence = drawn(args.seed, index)
        calls += len(sequence)
        found = difference(world, sequence)
        if found and (name := unsettled(smallest(found))):
            known[name] += 1
        elif found:
            differing += 1
            print(f"sequence {index} of seed {args.seed}:\n{smallest(found)}", flush=True)
            if differing == args.most:
                break
        if sys.stdout.isatty() and index % 1000 == 0:
            print(f"\r{index - args.first:,}", end="", flush=True)
    done = index + 1 - args.first
    for name, count in known.items():
        print(f"{count:,} known: {name}")
    print(f"{done:,} sequences, {calls:,} calls, {differing} differ; {time.monotonic() - begun:.0f} s")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
