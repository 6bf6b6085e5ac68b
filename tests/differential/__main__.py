"""Many sequences, and the smallest of each that differs.

    python -m tests.differential --count 100000 --seed 1 --jobs 2

The exit status is 0 if no sequence differed but in what ``unsettled`` names.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tests.differential.search import difference, smallest
from tests.differential.sequences import drawn
from tests.differential.unsettled import unsettled

PORTION = 250


@dataclass
class Tally:
    """What came of some sequences."""

    sequences: int = 0
    calls: int = 0
    known: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in what came of others."""
        self.sequences += other.sequences
        self.calls += other.calls
        self.known += other.known
        self.differing += other.differing


def asked(first: int, *, seed: int, end: int) -> Tally:
    """Ask a portion of the sequences of a seed."""
    tally = Tally()
    for index in range(first, min(first + PORTION, end)):
        world, calls = drawn(seed, index)
        found = difference(world, calls)
        tally.sequences += 1
        tally.calls += len(calls)
        if found is None:
            continue
        least = smallest(found)
        name = unsettled(least)
        if name:
            tally.known[name] += 1
        else:
            tally.differing.append(f"sequence {index} of seed {seed}:\n{least}\n")
    return tally


def main() -> int:
    """Ask the sequences ``first`` to ``first + count`` of a seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many sequences")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument("--most", type=int, default=20, help="stop after so many that differ")
    args = parser.parse_args()
    begun, whole, end = time.monotonic(), Tally(), args.first + args.count
    portions = range(args.first, end, PORTION)
    with ProcessPoolExecutor(args.jobs) as pool:
        for tally in pool.map(partial(asked, seed=args.seed, end=end), portions):
            whole.add(tally)
            sys.stdout.writelines(tally.differing)
            if sys.stdout.isatty():
                sys.stdout.write(f"\r{whole.sequences:,}")
            sys.stdout.flush()
            if len(whole.differing) >= args.most:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    for name, count in whole.known.items():
        sys.stdout.write(f"{count:,} known: {name}\n")
    seconds = time.monotonic() - begun
    sys.stdout.write(
        f"{whole.sequences:,} sequences of seed {args.seed}, {whole.calls:,} calls, {len(whole.differing)} differ; "
        f"{seconds:.0f} s\n"
    )
    return int(bool(whole.differing))


if __name__ == "__main__":
    sys.exit(main())
