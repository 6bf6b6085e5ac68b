"""What is read of the memory of a guest that is watched: of a file that QEMU shares, and where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import subpage
from capture.qemu import Guest
from capture.ram import Backing
from service.cli.live_memory import make_machine
from service.settings import MIB, Settings
from tests.support.server import running

HIGH = 1 << 32
BELOW, ABOVE = b"below 4 GiB", b"above"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """RAM of a guest with 1 MiB of it above 4 GiB, which the file has behind the rest."""
    path = tmp_path / "ram" / "guest"
    path.parent.mkdir()
    path.write_bytes(bytes(0x1000) + BELOW.ljust(2 * MIB - 0x1000, b"\0") + ABOVE.ljust(MIB, b"\0"))
    return path


@pytest.fixture
def client(file: Path) -> Iterator[subpage.Client]:
    """Of a service that may read this file, and no other one."""
    with running(Settings(warm_up=False, memory_files=(file,))) as server, subpage.Client(server.url) as client:
        yield client


def guest(*backing: Backing) -> Guest:
    return Guest(3 * MIB, ((0, 2 * MIB), (HIGH, MIB)), 1, 4, backing)


def shared(file: Path) -> Guest:
    return guest(Backing(str(file), 0), Backing(str(file), 2 * MIB))


def test_what_is_read_is_what_the_file_has_by_then(client: subpage.Client, file: Path) -> None:
    vm, told = make_machine(client, shared(file), {"name": "live", "spp": True})
    assert told == [f"the machine's memory is the guest's as it is now: {file}"]
    assert (vm.read_memory(0x1000, len(BELOW)), vm.read_memory(HIGH, len(ABOVE))) == (BELOW, ABOVE)
    with file.open("r+b") as written:
        written.write(b"present")
    assert vm.read_memory(0, 7) == b"present"


def test_what_is_not_shared_is_empty_and_why_is_told(client: subpage.Client, file: Path) -> None:
    private = Backing(None, 0, "the guest's RAM is in no file")
    vm, told = make_machine(client, guest(private, private), {"name": "live"})
    assert told == ["the machine's memory is empty: the guest's RAM is in no file"]
    assert vm.read_memory(0x1000, len(BELOW)) == bytes(len(BELOW))
    vm, told = make_machine(client, guest(Backing(str(file), 0), private), {"name": "live"})
    assert told[1:] == ["part of the machine's memory is empty: the guest's RAM is in no file"]
    assert (vm.read_memory(0x1000, len(BELOW)), vm.read_memory(HIGH, 8)) == (BELOW, bytes(8))


def test_a_service_that_may_not_read_the_file_has_a_machine_without_it(client: subpage.Client, file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    vm, (line,) = make_machine(client, shared(other), {"name": "live"})
    assert line.startswith("the machine's memory is empty: ") and f"below {file}" in line
    assert line.endswith(f"SUBPAGE_MEMORY_FILES='[\"{other}\"]' of a service here has it read")
    assert vm.read_memory(0x1000, len(BELOW)) == bytes(len(BELOW))
    assert [found.id for found in client.vms()] == [vm.id]


def test_a_service_elsewhere_that_has_another_file_by_that_name_is_noticed(
    client: subpage.Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is of another time than the one which the service found."""
    here = file.with_name("here")
    here.write_bytes(bytes(3 * MIB))
    os.utime(here, (1, 1))
    monkeypatch.setattr("service.cli.live_memory.look", lambda path: here.stat())
    vm, (line,) = make_machine(client, shared(file), {"name": "live"})
    assert "is empty: the service has another file by that name" in line
    assert vm.read_memory(0x1000, len(BELOW)) == bytes(len(BELOW))
    assert [found.id for found in client.vms()] == [vm.id]
