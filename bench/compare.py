"""Two checkouts side by side: ``python -m bench.compare BASE --only checks`` runs the bench of each in turn.

The base is checked out beside the sources and measured with the same environment and with its own ``bench``. Rows that
both have are compared: the median over the turns of the rate now by the rate of the same turn then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import rate

Key = tuple[str, str, str, str]


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A work tree of a revision, taken away at the end. CalledProcessError if there is no such revision."""
    with tempfile.TemporaryDirectory(prefix="subpage-bench-") as folder:
        place = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(place), revision], check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], check=True)


def rates(place: Path, arguments: Sequence[str]) -> dict[Key, float]:
    """Items per second of each row of one run in a work tree, whose packages stand before those installed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "bench", "--json", file.name, *arguments]
        subprocess.run(command, check=True, cwd=place, stdout=subprocess.DEVNULL)
        results: dict[str, Any] = json.loads(Path(file.name).read_text())
    return {
        (section, row.get("trace", ""), row.get("policy", ""), row["method"]): row["per_second"]
        for section, rows in results.items()
        if section not in ("environment", "summary")
        for row in rows
        if "per_second" in row
    }


def compare(base: Path, turns: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that both have: the median rate of each, and the median of the ratios of neighbours."""
    pairs: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(turns):
        then, now = rates(base, arguments), rates(Path.cwd(), arguments)
        for key in then.keys() & now.keys():
            pairs[key].append((then[key], now[key]))
    return [
        {
            "row": " ".join(part for part in key if part),
            "then": statistics.median(then for then, _ in found),
            "now": statistics.median(now for _, now in found),
            "ratio": statistics.median(now / then for then, now in found),
        }
        for key, found in sorted(pairs.items())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--turns", type=int, default=5, help="runs of each, in turn (5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run (3)")
    parser.add_argument("--only", nargs="+", default=["checks"], help="parts to run (checks)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    if min(options.turns, options.rounds) < 1:
        parser.error("--turns and --rounds are at least 1")
    arguments = ["--rounds", str(options.rounds), "--only", *options.only]
    try:
        with checkout(options.base) as base:
            rows = compare(base, options.turns, arguments)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}: status {error.returncode}", file=sys.stderr)
        return 1
    table = Table(title=f"Beside {options.base}", title_justify="left")
    for heading in ("row", "then", "now", "now / then"):
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in rows:
        table.add_row(row["row"], rate(row["then"]), rate(row["now"]), f"{row['ratio']:.3f}")
    Console(width=None if Console().is_terminal else 120).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
