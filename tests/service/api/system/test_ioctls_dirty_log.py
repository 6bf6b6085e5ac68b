"""KVM_GET_DIRTY_LOG: the pages written since the last call, and what each failure leaves."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.contract.client import ContractClient
from tests.support.http import access
from tests.support.ioctls import PROFILES, Result, ioctl, region

MakeVm = Callable[..., str]
BASE, PAGES = 0x10_0000, 70
BITMAP = 0x7F00_0000
ROOM = 16  # 70 bits in whole 64-bit words


@pytest.fixture(params=PROFILES)
def url(request: pytest.FixtureRequest, client: ContractClient, make_vm: MakeVm) -> str:
    """A machine with slot 3, 70 pages at 1 MiB, whose writes are logged."""
    made = make_vm(profile=request.param, spp=False, memory_slots=[{"slot": 0, "gpa": 0, "size": BASE}])
    assert ioctl(client, made, "KVM_SET_USER_MEMORY_REGION", region(3, 1, BASE, PAGES << 12)).short == 0
    return made


def log(client: ContractClient, url: str, slot: int, room: int = ROOM, address: int = BITMAP, **more: bool) -> Result:
    """Call it with ``room`` bytes for the bitmap, which hold ones before."""
    memory = [{"addr": hex(BITMAP), "data": "ff" * room}]
    return ioctl(client, url, "KVM_GET_DIRTY_LOG", struct.pack("<IIQ", slot, 0, address), memory=memory, **more)


def write(client: ContractClient, url: str, *pages: int) -> None:
    for page in pages:
        assert access(client, url, gpa=BASE + (page << 12))["landed"] is True


def pages_of(answer: Result) -> list[int]:
    word = int.from_bytes(answer.memory[0], "little")
    return [page for page in range(word.bit_length()) if word >> page & 1]


def test_pages_written_since_the_last_call(client: ContractClient, url: str) -> None:
    assert (log(client, url, 3).short, pages_of(log(client, url, 3))) == (0, [])
    write(client, url, 0, 5, 69, 5)
    assert client.post(f"{url}/accesses", json={"gpa": BASE + 0x7000, "access": "read"}).status_code == 200
    assert pages_of(log(client, url, 3)) == [0, 5, 69]
    assert pages_of(log(client, url, 3)) == []
    write(client, url, 5)
    answer = log(client, url, 3, room=ROOM + 4)
    assert (answer.short, answer.memory[0][ROOM:]) == (0, b"\xff" * 4), "no more than whole words"
    assert answer.memory[0][:ROOM] == (1 << 5).to_bytes(ROOM, "little")


@pytest.mark.parametrize("slot", [0, 4, 1 << 16, 1 << 16 | 3])
def test_a_slot_without_a_log(client: ContractClient, url: str, slot: int) -> None:
    answer = log(client, url, slot)
    assert (answer.short, answer.memory[0]) == ("ENOENT", b"\xff" * ROOM)


@pytest.mark.parametrize("slot", [0xFFFF, 2 << 16, 0xFFFF << 16 | 3])
def test_numbers_that_cannot_be(client: ContractClient, url: str, slot: int) -> None:
    assert log(client, url, slot).errno == "EINVAL"


def test_the_structure_must_be_readable(client: ContractClient, url: str) -> None:
    for data in (None, b"", struct.pack("<IIQ", 3, 0, BITMAP)[:15]):
        assert ioctl(client, url, "KVM_GET_DIRTY_LOG", data).errno == "EFAULT"


@pytest.mark.parametrize(
    ("room", "address", "read_only"),
    [(ROOM, 0, False), (ROOM, BITMAP + 1, False), (8, BITMAP, False), (ROOM, BITMAP, True)],
)
def test_a_bitmap_that_cannot_be_written(
    client: ContractClient, url: str, room: int, address: int, read_only: bool
) -> None:
    """The kernel has emptied the log by then."""
    write(client, url, 2)
    assert log(client, url, 3, room, address, read_only=read_only).errno == "EFAULT"
    assert pages_of(log(client, url, 3)) == []


def test_the_log_of_system_management_mode_is_empty(client: ContractClient, url: str) -> None:
    smm = 1 << 16 | 3
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(smm, 1, BASE, PAGES << 12)).short == 0
    write(client, url, 1)
    assert pages_of(log(client, url, smm)) == []
    assert pages_of(log(client, url, 3)) == [1]


def test_logging_switched_off_and_on_begins_anew(client: ContractClient, url: str) -> None:
    write(client, url, 1)
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(3, 0, BASE, PAGES << 12)).short == 0
    assert log(client, url, 3).errno == "ENOENT"
    assert ioctl(client, url, "KVM_SET_USER_MEMORY_REGION", region(3, 1, BASE, PAGES << 12)).short == 0
    assert pages_of(log(client, url, 3)) == []
    write(client, url, 1)
    assert pages_of(log(client, url, 3)) == [1]
