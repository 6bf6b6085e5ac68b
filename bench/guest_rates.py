"""What watching costs a guest: ``python -m bench.guest_rates``, on Debian, whose kernel and busybox it fetches.

The guest compresses and hashes; how long that takes is by its own clock, which is that of the host. Each way of looking
at it is run so many times, one after the other, and the best of each is told.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.environment import environment
from capture.guest import QEMU, START, SmallGuest, small_guest
from capture.recording import Recording, Wanted
from service.cli.recorded_files import RecordedFile
from service.cli.symbol_policies import read_symbols

ROOT = Path(__file__).parents[1]
WORKED = re.compile(r"guest: worked from ([0-9.]+) to ([0-9.]+)")


class Runs:
    """The ways to run one guest. Each gives the seconds of its work, and the stores that were seen of it."""

    def __init__(self, guest: SmallGuest, folder: Path) -> None:
        at = (told := guest.command(append="subpage=work")).index("stdio")
        self.command = [*told[:at], f"file:{folder / 'console'}", *told[at + 1 :]]
        self._guest, self._folder = guest, folder
        self._start = read_symbols(guest.symbols).table.find(START)[0].address

    def alone(self) -> tuple[float, int]:
        subprocess.run(self.command, check=True, stdin=subprocess.DEVNULL)
        return self._worked(), 0

    def thrown_away(self) -> tuple[float, int]:
        with Recording(self.command, Wanted(start_pc=self._start)) as recording:
            for _ in recording:
                pass
        return self._worked(), recording.taken

    def recorded(self, suffix: str) -> tuple[float, int]:
        with Recording(self.command, Wanted(start_pc=self._start)) as recording:
            file = RecordedFile(self._folder / f"guest{suffix}", suffix, recording.identity())
            for records in recording:
                file.add(records)
            file.close()
        return self._worked(), recording.taken

    def live(self, objects: int) -> tuple[float, int]:
        """So many objects of 128 bytes, spread over the kernel's image, none of which is written to."""
        named = [f'{{"name": "o{n}", "gpa": "{0x1000000 + 4096 * n:#x}", "size": 128}}' for n in range(objects)]
        policy = self._folder / "policy.json"
        policy.write_text(f'{{"name": "many", "objects": [{", ".join(named)}]}}', encoding="utf-8")
        command = [sys.executable, "-m", "service.cli", "live", "--policy", str(policy), "--json"]
        command += ["--symbols", str(self._guest.symbols), "--start", START, "--", *self.command]
        done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        found = re.search(r'"records": (\d+)', done.stdout)
        assert found is not None
        return self._worked(), int(found[1])

    def _worked(self) -> float:
        found = WORKED.search((self._folder / "console").read_text(errors="replace"))
        assert found is not None, "the guest did not come to its end"
        return float(found[2]) - float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.guest_rates", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="WORDS", help="ways whose names have these words, thrown away beside them")
    parser.add_argument("--qemu", default=QEMU, metavar="PROGRAM", help="another one than is installed")
    given = parser.parse_args()
    rounds = given.rounds
    print("  ".join(f"{name} {value}" for name, value in environment().items()))
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(small_guest(ROOT / "build" / "guest", given.qemu), Path(folder))
        ways: dict[str, Callable[[], tuple[float, int]]] = {
            "alone": runs.alone,
            "thrown away": runs.thrown_away,
            "recorded, .parquet": lambda: runs.recorded(".parquet"),
            "recorded, .arrow": lambda: runs.recorded(".arrow"),
            "live, 20 objects": lambda: runs.live(20),
            "live, 2,000 objects": lambda: runs.live(2000),
        }
        if given.only:
            ways = {name: run for name, run in ways.items() if given.only in name or name == "thrown away"}
        found: dict[str, list[tuple[float, int, float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                before = computed()
                seconds, stores = run()
                here, there = (after - then for after, then in zip(computed(), before, strict=True))
                found[name].append((seconds, stores, here, there))
                print(f"  {name}: {seconds:.2f} s, {stores:,} stores", file=sys.stderr, flush=True)
    least = min(row[0] for row in found["thrown away"])
    print("of its work; CPU of this process, and of QEMU with, of live, the service and its reader:")
    for name, rows in found.items():
        seconds, stores, here, there = min(rows)
        rate = f"{stores / seconds / 1e6:6.1f} M stores/s"
        print(f"{name:<22} {seconds:7.2f} s  {seconds / least:5.2f} x  {rate}  {here:6.1f} s  {there:6.1f} s")


def computed() -> tuple[float, float]:
    """Seconds of CPU so far: this process's, and of those that it has started and that have ended."""
    now = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    here, there = (usage.ru_utime + usage.ru_stime for usage in now)
    return here, there


if __name__ == "__main__":
    main()
