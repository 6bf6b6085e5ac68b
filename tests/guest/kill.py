"""Kill the reader of a guest, its service or its QEMU at a random moment: ``python -m tests.guest.kill --rounds 20``.

A guest of 60 bytes stores to a protected word all the time. After each round: what a client has been shown of the trace
is there, and no process and no shared memory of ours is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.support.processes import free_port, served
from tests.support.qemu import QEMU
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
# At 0x7c00, 16-bit, interrupts off: 67 million stores round and round, each 256th to 0x8000; then the power goes off.
CODE = bytes.fromhex(
    "fa 31c0 8ed8 8ec0 be0004"  # cli; ds = es = 0; mov si, 1024
    "b9ffff"  # again: mov cx, 0xffff
    "88cb 30ff c1e303 8b06007e 898f0080"  # bx = (cl) * 8; mov ax, [0x7e00]; mov [bx + 0x8000], cx
    "e2ef 4e 75e9"  # loop; dec si; jnz again
    "ba0406 b80020 ef f4 ebfd"  # ACPI S5
)
KINDS = ("reader", "reader with a service of its own", "service", "qemu")


def machine(folder: Path) -> list[str]:
    disk = folder / "disk.img"
    disk.write_bytes(CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    qemu = [QEMU, "-M", "pc,accel=tcg", "-m", "16M", "-nodefaults", "-vga", "none"]
    return [*qemu, "-display", "none", "-drive", f"file={disk},format=raw,if=ide"]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shared_memory() -> set[str]:
    """What has a name; others use it, too."""
    names = {path.name for path in Path("/dev/shm").iterdir()}
    return {name for name in names if "subpage" in name or "qemu" in name}


@contextmanager
def watching(folder: Path, url: str | None) -> Iterator[subprocess.Popen[str]]:
    """``subpage live`` of the guest; killed at the end, whatever is left of it."""
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"name": "policy", "objects": [{"name": "secret", "gpa": "0x8000", "size": 8}]}))
    command = [sys.executable, "-m", "service.cli", "live", "--policy", str(policy), "--start", "0x7c00", "--json"]
    command += ["--publish-every", "50ms", *(["--server", url] if url else []), "--", *machine(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as live:
        try:
            yield live
        finally:
            live.kill()


def trace_of(client: httpx2.Client) -> dict[str, Any] | None:
    """The trace of the newest machine, once there is one."""
    machines = client.get("/v1/vms").raise_for_status().json()["vms"]
    if not machines:
        return None
    traces = client.get(f"/v1/vms/{machines[-1]['id']}/traces").raise_for_status().json()["traces"]
    return dict(traces[-1]) if traces else None


def shown(client: httpx2.Client, seconds: float, live: subprocess.Popen[str]) -> dict[str, Any]:
    """The trace as it was last seen before a moment some seconds after it began."""
    until(lambda: trace_of(client) is not None or live.poll() is not None)
    deadline = time.monotonic() + seconds
    found = trace_of(client)
    while time.monotonic() < deadline and live.poll() is None:
        found = trace_of(client)
        time.sleep(0.01)
    assert found is not None, live.communicate()
    return found


def check(before: dict[str, Any], after: dict[str, Any] | None) -> None:
    """What was shown is there, and nothing is half."""
    assert after is not None and after["id"] == before["id"]
    for name in ("records", "violations"):
        assert after[name] >= before[name], (name, before, after)
    assert after["state"] in ("interrupted", "finished") and after["resume_at"] == after["records"]
    assert after["by_object"]["secret"]["violations"] == after["violations"]


def one_round(kind: str, seconds: float, folder: Path) -> str:
    """Kill one after some seconds; what came of it, in words."""
    memory = shared_memory()
    if kind == "reader with a service of its own":
        with watching(folder, None) as live:
            until(lambda: any(_is_qemu(pid) for pid in descendants(live.pid)))
            time.sleep(seconds)
            ours = descendants(live.pid)
            live.kill()
        said = f"{len(ours)} processes ended"
    else:
        store, port = f"sqlite:///{folder / 'store.db'}", free_port()
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as client:
            with served(port, store) as service, watching(folder, f"http://127.0.0.1:{port}") as live:
                before = shown(client, seconds, live)
                ours = descendants(live.pid)
                victim = {"reader": live.pid, "service": service.pid}.get(kind) or next(filter(_is_qemu, ours))
                os.kill(victim, signal.SIGKILL)
                if kind == "service":
                    service.wait()
                _, told = live.communicate(timeout=120)
                assert live.returncode in (-9, 0, 1, 4), (live.returncode, told)
                if kind != "service":
                    until(lambda: (trace_of(client) or {})["state"] != "running")
                    check(before, trace_of(client))
            if kind == "service":
                with served(port, store):
                    check(before, trace_of(client))
        last = told.strip().splitlines()[-1] if told.strip() else ""
        said = f"{before['records']:,} records were shown; {last}"
    until(lambda: not any(map(alive, ours)))
    assert shared_memory() <= memory, shared_memory() - memory
    return said


def _is_qemu(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    for number in range(given.rounds):
        kind, seconds = KINDS[number % len(KINDS)], chance.uniform(0, 3)
        with tempfile.TemporaryDirectory() as folder:
            said = one_round(kind, seconds, Path(folder))
        tell(f"round {number + 1}: {kind} killed after {seconds:.2f} s: {said}")
    tell(f"{given.rounds} kills: nothing that was shown is lost, no process and no shared memory is left")


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
