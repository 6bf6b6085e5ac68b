"""Servers as child processes on free loopback ports, and a plain client."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

START_SECONDS = 300  # compiling every kernel on a fresh machine is part of the first start


@contextmanager
def serving(command: Sequence[str], ready: str, variables: Mapping[str, str] | None = None) -> Iterator[int]:
    """Run ``python -m <command>`` until the block ends; gives the port it says it listens on, once ``ready`` is 200."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=os.environ | (variables or {})
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)\s*$", line)
        if not found:
            raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
        port = int(found[1])
        deadline = time.monotonic() + START_SECONDS
        while call(port, "GET", ready, check=False)[0] != 200:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} did not become ready")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def service(store: str = "memory", **variables: str) -> Iterator[int]:
    """``subpage serve``, with environment variables."""
    command = ("service.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--store", store)
    with serving(command, "/readyz", variables) as port:
        yield port


@contextmanager
def service_and_constants(path: str, **variables: str) -> Iterator[int]:
    """The service, and on its loop a connection to a path that answers with constants."""
    with serving(("bench.kvmi_constant", path), "/readyz", variables) as port:
        yield port


@contextmanager
def empty_app() -> Iterator[int]:
    """The empty endpoint."""
    with serving(("bench.empty_app",), "/") as port:
        yield port


def call(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    content_type: str = "application/json",
    check: bool = True,
) -> tuple[int, Any]:
    """One request; status and decoded JSON. With ``check``, anything but 2xx raises ``RuntimeError``."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
        reply = connection.getresponse()
        raw = reply.read()
    finally:
        connection.close()
    if check and not 200 <= reply.status < 300:
        raise RuntimeError(f"{method} {path}: {reply.status} {raw[:500]!r}")
    return reply.status, json.loads(raw) if raw and "json" in reply.headers.get("Content-Type", "") else None


def post(port: int, path: str, document: Any) -> Any:
    """POST of JSON."""
    return call(port, "POST", path, json.dumps(document).encode())[1]
