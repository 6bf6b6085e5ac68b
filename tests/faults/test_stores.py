"""Disks full or read-only, databases that restart: the service says so, serves reads, and recovers by itself."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.http import OCTETS, map_of, new_vm, set_map
from tests.support.postgres import Cluster
from tests.support.stores import serving
from tests.support.waiting import until


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def journalled_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system that turns read-only at an error."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    image.write_bytes(bytes(16 * MIB))
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
        mount("-o", "loop,errors=remount-ro", str(image), str(folder))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("images of ext4 can be mounted by root only, where there are loop devices")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def device_of(folder: Path) -> Path:
    """What sysfs says of the file system that is mounted there."""
    lines = Path("/proc/mounts").read_text("utf-8").splitlines()
    device = next(line.split()[0] for line in lines if line.split()[1] == str(folder))
    return Path("/sys/fs/ext4") / Path(device).name


def repair(image: Path, folder: Path) -> None:
    """fsck, and mount again, once the service has let go of what it had open there."""

    def repaired() -> bool:
        # 1: errors were corrected. Above: the image is still in use, or cannot be repaired.
        return subprocess.run(["fsck.ext4", "-p", str(image)], check=False, capture_output=True).returncode <= 1

    until(repaired)
    mount("-o", "loop,errors=remount-ro", str(image), str(folder))


def write_memory(client: ContractClient, vm: str, gpa: int, size: int) -> int:
    reply = client.put(f"{vm}/memory", params={"gpa": gpa, "size": size}, content=b"\x55" * size, headers=OCTETS)
    if reply.status_code == 503:
        assert reply.json()["code"] == "store-unavailable" and reply.headers["Retry-After"]
    return reply.status_code


def test_disk_full(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{small_disk}/subpage.db"
    with serving(url) as service:
        client = service.client
        vm = new_vm(client)
        assert set_map(client, vm, 1, 0x11) == 204
        written = 0
        while write_memory(client, vm, written << 16, 1 << 16) == 204:
            written += 1
            assert written < 64, "the disk never fills"
        # What was refused is not there; what was acknowledged is; reads are served.
        assert client.get(f"{vm}/memory", params={"gpa": written << 16, "size": 4}).content == bytes(4)
        assert map_of(client, vm, 1) == 0x11
        before = client.get(vm).json()
        assert write_memory(client, vm, 0, 1 << 20) == 503 and client.get(vm).json() == before
        # Most often the commit itself has no room: the service opens the store anew, and asks what it has.
        assert "the disk is full" in caplog.text
        mount("-o", "remount,size=64m", str(small_disk))
        until(lambda: write_memory(client, vm, written << 16, 1 << 16) == 204)
        until(lambda: client.get("/readyz").status_code == 200)
    with serving(url) as service:
        for part in range(written + 1):
            content = service.client.get(f"{vm}/memory", params={"gpa": part << 16, "size": 1 << 16}).content
            assert content == b"\x55" * (1 << 16)


def test_read_only_disk(small_disk: Path) -> None:
    """A service on it is never ready, says why, and is as soon as the disk can be written."""
    url = f"sqlite:///{small_disk}/subpage.db"
    with serving(url) as service:
        vm = new_vm(service.client)
    mount("-o", "remount,ro", str(small_disk))
    with serving(url, ready=False) as service:
        until(lambda: "read-only" in service.client.get("/readyz").json()["detail"])
        assert service.client.get(vm).status_code == 503
        mount("-o", "remount,rw", str(small_disk))
        until(lambda: service.client.get("/readyz").status_code == 200)
        assert set_map(service.client, vm, 1, 0x22) == 204


def test_a_disk_that_turns_read_only(journalled_disk: Path) -> None:
    """As the kernel makes it when the disk fails: reads go on, and the service recovers when the disk is repaired."""
    url = f"sqlite:///{journalled_disk}/subpage.db"
    with serving(url) as service:
        client = service.client
        vm = new_vm(client)
        assert set_map(client, vm, 1, 0x11) == 204
        (device_of(journalled_disk) / "trigger_fs_error").write_text("1", "utf-8")
        assert set_map(client, vm, 1, 0x22) == 503
        # The commit that met the fault says "writing to the disk failed"; the next look at the store says why.
        until(lambda: "read-only" in client.get("/readyz").json().get("detail", ""))
        assert map_of(client, vm, 1) == 0x11
        subprocess.run(["umount", "--lazy", str(journalled_disk)], check=True)
        repair(journalled_disk.with_name("image"), journalled_disk)
        until(lambda: set_map(client, vm, 1, 0x33) == 204)
        assert client.get("/readyz").status_code == 200
    with serving(url) as service:
        assert map_of(service.client, vm, 1) == 0x33


def test_read_only_database(postgres: Cluster) -> None:
    postgres.sql("CREATE DATABASE readonly", database="postgres")
    url = postgres.url.rpartition("/")[0] + "/readonly"
    with serving(url) as service:
        client = service.client
        vm = new_vm(client)
        assert set_map(client, vm, 1, 0x11) == 204
        postgres.sql("ALTER SYSTEM SET default_transaction_read_only = on")
        postgres.sql("SELECT pg_reload_conf()")
        try:
            until(lambda: set_map(client, vm, 1, 0x22) == 503)
            reply = client.put(f"{vm}/subpages?gfn=1&npages=1", json={"access": [1]})
            assert reply.status_code == 503 and "read-only" in reply.json()["detail"]
            assert client.get(vm).status_code == 200
        finally:
            postgres.sql("ALTER SYSTEM RESET default_transaction_read_only")
            postgres.sql("SELECT pg_reload_conf()")
        until(lambda: set_map(client, vm, 1, 0x33) == 204)
        assert map_of(client, vm, 1) == 0x33


def test_a_database_that_restarts_under_load(postgres: Cluster) -> None:
    """Clients see 204 or 503 and nothing else; what was answered 204 stays, through both restarts."""
    postgres.sql("CREATE DATABASE restarted", database="postgres")
    url = postgres.url.rpartition("/")[0] + "/restarted"
    stop = threading.Event()
    statuses: list[int] = []
    # By machine: the last acknowledged word, and the one that was sent after it and not acknowledged.
    last: dict[str, list[int]] = {}

    def work(base: str, vm: str) -> None:
        word = 0
        with ContractClient(base_url=base, timeout=60.0) as client:
            while not stop.is_set():
                word += 1
                status = set_map(client, vm, 1, word)
                statuses.append(status)
                last[vm] = [word] if status == 204 else [*last.get(vm, [0xFFFF_FFFF]), word]

    with serving(url) as service, contextlib.ExitStack() as stack:
        vms = [new_vm(service.client) for _ in range(3)]
        threads = [threading.Thread(target=work, args=(service.url, vm)) for vm in vms]
        for thread in threads:
            thread.start()
        stack.callback(lambda: [thread.join() for thread in threads])
        stack.callback(stop.set)
        for _ in range(2):
            seen = len(statuses)
            until(lambda seen=seen: 204 in statuses[seen + 5 :])
            postgres.restart()
        seen = len(statuses)
        until(lambda: 204 in statuses[seen:] and all(len(words) == 1 for words in last.values()))
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {204, 503}
        assert all(map_of(service.client, vm, 1) in last[vm] for vm in vms)
    with serving(url) as service:
        assert all(map_of(service.client, vm, 1) in last[vm] for vm in vms)
