"""``python -m bench``: run everything side by side and print a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import sections
from bench.environment import environment
from bench.report import print_section, print_summary, summary

SECTIONS: dict[str, tuple[str, Callable[[int], list[sections.Row]]]] = {
    "checks": ("Checking every write of a recorded trace, one core, 16-byte records", sections.checks),
    "exits": (
        "Refused writes and first touches, one core; refused writes until SQLite has the exits",
        sections.exits,
    ),
    "gva": ("The same trace by linear addresses, through the guest's page tables", sections.guest_virtual),
    "unicorn": ("Calling Python for every write", sections.unicorn),
    "http": ("Replay over HTTP, from the first byte sent to the result", sections.http_replay),
    "network": ("The same taken apart: what each part of the way takes alone", sections.network),
    "ask": ("Asking a tool about every violation, over HTTP, by WebSocket and by KVMI", sections.asking),
    "kvmi": ("Pages of a guest by KVMI, one after the other", sections.kvmi_reads),
    "client": ("The Python client beside the same calls by httpx2", sections.client),
    "calls": ("Small calls, 16 keep-alive connections", sections.single_calls),
    "readers": ("Reading what tools write, one core, the records and nothing else", sections.readers),
    "footprints": ("Traces reduced to their places, one core, and what policies cost there", sections.footprints),
    "console": ("The console in Chromium", sections.console),
    "memory": ("A 1 TiB guest with ten protected pages", sections.large_guest),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to FILE")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each method, after one to warm up (5)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts to run")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    results: dict[str, Any] = {"environment": environment()}
    print("  ".join(f"{name} {value}" for name, value in results["environment"].items()))
    for name in options.only:
        title, run = SECTIONS[name]
        try:
            results[name] = run(options.rounds)
        except sections.WrongAnswer as error:
            print(f"wrong answer: {error}", file=sys.stderr)
            return 1
        print_section(title, results[name])
    results["summary"] = summary(results)
    print_summary(results["summary"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
