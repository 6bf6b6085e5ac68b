"""``python -m engine.warm``: compile all kernels; with ``--first`` only those that the main job calls."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from engine.warm.kernels import kernels, take_turns
from engine.warm.processes import CompilerEnded
from engine.warm.progress import progress_on
from engine.warm.steps import ALL
from engine.warm.whole import compile_kernels


def main() -> int:
    """The exit status."""
    parser = ArgumentParser(prog="python -m engine.warm", description=__doc__)
    parser.add_argument("--first", action="store_true", help="only what `subpage demo` needs")
    parser.add_argument("--jobs", type=int, default=None, help="processes; as many as there are cores by default")
    parser.add_argument("--worker", action="store_true", help="take the steps whose names come in, one a line")
    given = parser.parse_args()
    if given.worker:
        take_turns(kernels())
        for name in sys.stdin:
            ALL[name.strip()]()
            print("done", flush=True)
        return 0
    try:
        compile_kernels("first" if given.first else "all", progress_on(sys.stderr), processes=given.jobs)
    except CompilerEnded as ended:
        print(f"{ended}; --jobs 1 needs the least memory", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
