"""Thousands of readers who wait for the next event: they cost little, keep nobody waiting, and all of them get it."""

from __future__ import annotations

import resource
import socket
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.support.processes import free_port, served

# What the client's own process needs besides its sockets.
SPARE_FILES = 200
# Generous: what is asked is that it does not grow into hundreds of KiB, as a thread for each reader would.
MOST_BYTES = 256 << 10


def open_files_allowed(wanted: int) -> int:
    """Raise the limit of this process, and of those that it starts, as far as it may; how many readers that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(wanted + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed - SPARE_FILES


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def open_stream(port: int, vm: str) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), timeout=60.0)
    head = f"GET {vm}/events?after=latest HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    stream.sendall(head.encode())
    return stream


def read_until(stream: socket.socket, wanted: bytes) -> None:
    content = b""
    while wanted not in content:
        part = stream.recv(1 << 16)
        assert part, f"ended after {content[-200:]!r}"
        content += part


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def idle_streams(wanted: int, folder: Path) -> None:
    count = open_files_allowed(wanted)
    port = free_port()
    with (
        served(port, f"sqlite:///{folder}/subpage.db", "15") as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client,
    ):
        document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}], "spp": True}
        vm = client.post("/v1/vms", json=document).headers["Location"]
        streams = [open_stream(port, vm)]
        read_until(streams[0], b"retry:")
        before = resident(server.pid)
        began = time.perf_counter()
        streams += [open_stream(port, vm) for _ in range(count - 1)]
        for stream in streams[1:]:
            read_until(stream, b"retry:")
        opened = time.perf_counter() - began
        each = (resident(server.pid) - before) / max(1, count - 1)
        assert f"subpage_event_streams {float(count)}" in client.get("/metrics").text
        # Others are served, and every reader gets what they do.
        assert client.get(vm).status_code == 200
        began = time.perf_counter()
        ranges = [{"gfn": 1, "npages": 1, "access": 0}]
        assert client.patch(f"{vm}/subpages", json={"ranges": ranges}).status_code == 204
        answered = time.perf_counter() - began
        for stream in streams:
            read_until(stream, b'"kind":"subpages"')
        told = time.perf_counter() - began
        say(
            f"\n{count} idle streams of {wanted} asked for, opened in {opened:.1f} s, {each / 1024:.1f} KiB each; a "
            f"change was answered in {answered * 1000:.0f} ms and told to all in {told:.2f} s"
        )
        assert each < MOST_BYTES
        assert client.delete(vm).status_code == 204
        for stream in streams:
            read_until(stream, b'"reason":"deleted"')
            stream.close()
        assert client.get("/livez").status_code == 200


def test_two_hundred_idle_streams(tmp_path: Path) -> None:
    idle_streams(200, tmp_path)


@pytest.mark.soak
def test_ten_thousand_idle_streams(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():
        idle_streams(10_000, tmp_path)
