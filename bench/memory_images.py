"""Loading memory images over HTTP into a service with a store: rates, memory, the store, and what neighbours notice.

``python -m bench.memory_images [MIB]``: images of so many MiB (1,024), of zeros, a quarter and all of them other bytes.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import servers

MIB = 1 << 20
PIECE = 4 * MIB


def image(path: Path, size: int, share: int) -> None:
    """A raw image in which ``share`` of four pages is not zero."""
    rng = np.random.default_rng(1)
    kept = np.arange(PIECE // 4096) % 4 < share
    with path.open("wb") as file:
        for _ in range(size // PIECE):
            pages = rng.integers(0, 64, (PIECE // 4096, 4096), dtype=np.uint8)
            pages[~kept] = 0
            file.write(pages.tobytes())


@contextmanager
def service(folder: Path, size: int) -> Iterator[tuple[int, int]]:
    """A service with a store in ``folder`` and room for images of ``size``: its port and its process."""
    for name, value in (
        ("MAX_MEMORY_BYTES", 4 * size),
        ("MAX_IMAGE_MEMORY_BYTES", 2 * size),
        ("MAX_LOADED_BYTES", 4 * size),
    ):
        os.environ[f"SUBPAGE_{name}"] = str(value)
    store = f"sqlite:///{folder}/store.db"
    command = ("service.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--store", store)
    with servers.serving(command, "/readyz") as port:
        pids = subprocess.run(["pgrep", "-f", store], check=True, capture_output=True, text=True).stdout.split()
        yield port, int(pids[0])


def peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


class Neighbour(threading.Thread):
    """Changes a machine of its own over and over, and reads /livez: the longest of each."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.ended = port, threading.Event()
        self.longest = {"commit": 0.0, "livez": 0.0}

    def run(self) -> None:
        vm = made(self.port, MIB)
        calls = {"commit": ("PUT", f"{vm}/memory?gpa=0", b"neighbour"), "livez": ("GET", "/livez", None)}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while not self.ended.is_set():
            for name, (method, path, body) in calls.items():
                began = time.perf_counter()
                connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
                connection.getresponse().read()
                self.longest[name] = max(self.longest[name], time.perf_counter() - began)
            time.sleep(0.02)


def made(port: int, size: int) -> str:
    document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": size}]}
    return f"/v1/vms/{servers.post(port, '/v1/vms', document)['id']}"


def put(port: int, vm: str, path: Path) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with path.open("rb") as file:
        connection.request("PUT", f"{vm}/memory?format=raw", file, {"Content-Type": "application/octet-stream"})
        reply = connection.getresponse()
        return dict(json.loads(reply.read()))


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) * MIB
    heads = f"{'seconds':>8}{'MiB/s':>7}{'peak MiB':>10}{'store MiB':>11}{'commit s':>10}{'livez s':>9}"
    print(f"{'image':<14}{'sent':<8}{heads}")
    for title, share in (("zeros", 0), ("a quarter", 1), ("all", 4)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "image"
            image(path, size, share)
            for way in ("raw", "command"):
                with service(folder, size) as (port, pid):
                    before = peak(pid)
                    neighbour = Neighbour(port)
                    vm = made(port, size) if way == "raw" else ""
                    neighbour.start()
                    began = time.perf_counter()
                    if way == "raw":
                        put(port, vm, path)
                    else:
                        command = [sys.executable, "-m", "service.cli", "vm", "load", str(path)]
                        subprocess.run([*command, "--url", f"http://127.0.0.1:{port}"], check=True, capture_output=True)
                    seconds = time.perf_counter() - began
                    neighbour.ended.set()
                    neighbour.join()
                    grown = (peak(pid) - before) / MIB
                stored = sum(file.stat().st_size for file in folder.glob("store.db*")) / MIB
                for file in folder.glob("store.db*"):
                    file.unlink()
                longest = neighbour.longest
                print(
                    f"{title:<14}{way:<8}{seconds:>8.1f}{size / MIB / seconds:>7.0f}{grown:>10.0f}{stored:>11.0f}"
                    f"{longest['commit']:>10.2f}{longest['livez']:>9.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
