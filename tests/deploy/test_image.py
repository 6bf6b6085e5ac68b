"""The image: its recipe carried out in an empty folder, and its command run as a container would run it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.deploy.recipe import ROOT, Image

pytestmark = pytest.mark.image

TOKEN = secrets.token_hex(32)
START_SECONDS = 300
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    with tempfile.TemporaryDirectory(prefix="subpage-image-") as folder:
        Path(folder).chmod(0o755)
        made = Image(Path(folder))
        made.build((ROOT / "Dockerfile").read_text(encoding="utf-8"))
        yield made


def inventory(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below ``folder`` with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if not path.is_dir():
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def outside_of_volumes(image: Image) -> dict[str, tuple[int, int]]:
    written = [place.lstrip("/") for place in (*image.volumes, "/tmp")]
    return {path: seen for path, seen in inventory(image.root).items() if not path.startswith(tuple(written))}


@contextlib.contextmanager
def container(image: Image, **environment: str) -> Iterator[tuple[httpx2.Client, subprocess.Popen[bytes], str]]:
    """The image's command under way, ready; a client with the token, the process, its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    invocation = image.invocation(image.command, SUBPAGE_PORT=port, SUBPAGE_TOKEN=TOKEN, **environment)
    with subprocess.Popen(**invocation, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            authorized = {"Authorization": f"Bearer {TOKEN}"}
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=authorized, timeout=60.0) as client:
                wait_until_ready(client, process)
                yield client, process, port
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def wait_until_ready(client: httpx2.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx2.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the service did not become ready")


def test_what_is_in_it(image: Image) -> None:
    packages = {path.name for path in (image.root / "opt/subpage/.venv/lib").glob("python*/site-packages/*")}
    assert {"engine", "service", "numba", "pyarrow"} <= packages
    assert not {"pip", "setuptools", "pytest", "tests"} & packages, "what only builds or tests is left behind"
    assert {path.name for path in (image.root / "opt/subpage").iterdir()} == {".venv"}, "no sources but the package"
    assert os.geteuid() or (image.root / "var/lib/subpage").stat().st_uid == int(image.user)
    assert (image.root / "var/lib/subpage").stat().st_mode & 0o777 == 0o700
    kernels = list((image.root / "var/cache/subpage").rglob("*.nbc"))
    assert len(kernels) > 20, "kernels are compiled in the image"


def test_it_does_not_start_without_a_token(image: Image) -> None:
    refused = image.run(image.command, SUBPAGE_PORT="0")
    assert refused.returncode != 0 and "token" in refused.stderr


def test_it_serves_and_keeps_what_it_is_told(image: Image) -> None:
    """As its own user, nothing written outside of the three places, no kernel compiled again, healthy."""
    before = outside_of_volumes(image)
    kernels = inventory(image.root / "var/cache/subpage")
    with container(image) as (client, process, port):
        if os.geteuid() == 0:
            owners = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            assert f"Uid:\t{image.user}\t{image.user}" in owners and f"Gid:\t{image.user}" in owners
        health = image.run(image.health, SUBPAGE_PORT=port)
        assert health.returncode == 0, health.stderr
        document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}
        vm = client.post("/v1/vms", json=document).headers["Location"]
        assert client.put(f"{vm}/subpages?gfn=2", json={"access": ["0xfffffffe"]}).status_code == 204
        records = (0x2000).to_bytes(8, "little") * 3 + (0x3000).to_bytes(8, "little")
        reply = client.post(f"{vm}/traces?record=gpa8", content=records, headers=OCTETS)
        assert reply.status_code == 201 and reply.json()["violations"] == 3
        assert httpx2.get(f"{client.base_url}/v1/vms").status_code == 401
    with container(image) as (client, _, _):
        assert client.get(f"{vm}/subpages?gfn=2").json()["access"] == ["0xfffffffe"]
        assert [trace["violations"] for trace in client.get(f"{vm}/traces").json()["traces"]] == [3]
    assert outside_of_volumes(image) == before
    assert inventory(image.root / "var/cache/subpage") == kernels


@contextlib.contextmanager
def read_only(image: Image) -> Iterator[None]:
    """The root file system read-only, as with ``docker run --read-only --tmpfs /tmp``; the volumes are not."""
    written = [image.root / place.lstrip("/") for place in (*image.volumes, "/tmp")]
    places = [str(place) for place in (image.root, *written)]
    done: list[str] = []
    try:
        for place in places:
            try:
                subprocess.run(["mount", "--bind", place, place], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("folders can be mounted by root only")
            done.append(place)
        subprocess.run(["mount", "-o", "remount,bind,ro", places[0]], check=True, capture_output=True)
        yield
    finally:
        for place in reversed(done):
            subprocess.run(["umount", place], check=True)


def test_it_serves_from_a_read_only_root(image: Image) -> None:
    with read_only(image):
        with pytest.raises(OSError, match="Read-only file system"):
            (image.root / "opt/subpage/new").write_text("", encoding="utf-8")
        with container(image) as (client, _, _):
            document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}
            vm = client.post("/v1/vms", json=document).headers["Location"]
            records = (0x2000).to_bytes(8, "little") * 200_000
            reply = client.post(f"{vm}/traces?record=gpa8", content=records, headers=OCTETS)
            assert reply.status_code == 201 and reply.json()["records"] == 200_000


def test_health_of_nothing(image: Image) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert image.run(image.health, SUBPAGE_PORT=str(taken.getsockname()[1])).returncode != 0
