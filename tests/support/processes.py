"""``subpage serve`` as a process of its own, as people run it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from tests.support.waiting import until


@contextmanager
def served(port: int, store: str, heartbeat: str = "0.05") -> Iterator[subprocess.Popen[str]]:
    """On that port and store, until it is ready; killed at the end."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--store", store]
    environment = {**os.environ, "SUBPAGE_WARM_UP": "false", "SUBPAGE_EVENT_HEARTBEAT": heartbeat}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None and started.stdout.readline()
            url = f"http://127.0.0.1:{port}"
            until(lambda: httpx2.get(f"{url}/readyz").status_code == 200)
            yield started
        finally:
            started.kill()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(**environment: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """On a port of its own choice; its URL and its port."""
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", "--port", "0"],
        env={**os.environ, "SUBPAGE_WARM_UP": "false", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            assert started.stdout is not None
            url = started.stdout.readline().strip().removeprefix("subpage is listening on ")
            yield started, url, int(url.rpartition(":")[2])
        finally:
            if started.poll() is None:
                started.kill()
