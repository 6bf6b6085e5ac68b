"""``subpage vm load``: from a file to a machine with its memory, slots and registers."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from engine.images import FORMATS
from service.cli.app import app
from service.cli.image_files import beside, slots_of
from service.cli.images import ImageFormat
from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support.images import elf_core, lime, qemu_note
from tests.support.server import Running

runner = CliRunner()
PAGE = 4096
REGISTERS = {"cr0": 0x80050033, "cr3": 0x1234000, "cr4": 0x6F0}
CORE = elf_core(
    [(0, b"a" * 0x9F000), (0x100000, bytes(MIB) + b"b" * PAGE)], qemu_note(REGISTERS) + qemu_note({"cr0": 0x60000010})
)


@pytest.fixture
def load(service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command on a file of that content; its status and what it says."""
    monkeypatch.delenv("SUBPAGE_TOKEN", raising=False)
    monkeypatch.setenv("SUBPAGE_URL", service.url)

    def run(content: bytes, *options: str, name: str = "memory.img") -> tuple[int, str]:
        path = tmp_path / name
        path.write_bytes(content)
        result = runner.invoke(app, ["vm", "load", str(path), *options])
        assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, result.output

    return run


def machines(client: ContractClient) -> list[str]:
    return [vm["id"] for vm in client.get("/v1/vms").json()["vms"]]


def test_formats_are_those_of_the_engine() -> None:
    assert tuple(ImageFormat) == FORMATS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz"])
def test_a_core_becomes_a_machine(load: Callable[..., tuple[int, str]], client: ContractClient, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}[suffix]
    status, said = load(pack(CORE), "--json", "--spp", "--progress", name=f"guest.core{suffix}")
    assert status == 0, said
    found = json.loads(said[said.index("{") :])
    url = f"/v1/vms/{found['vm']}"
    machine = client.get(url).json()
    assert machine["name"] == f"guest.core{suffix}" and machine["spp"] and len(machine["vcpus"]) == 2
    assert [(slot["gpa"], slot["size"]) for slot in machine["memory_slots"]] == [
        ("0x0", "0x9f000"),
        ("0x100000", "0x101000"),
    ]
    assert found["pages_kept"] == 0x9F + 1
    assert client.get(f"{url}/memory?gpa=0x1fffff&size=2").content == b"\0b"
    vmcs = [client.get(f"{url}/vcpus/{n}/vmcs").json() for n in (0, 1)]
    assert [(one["cr0"], one["cr3"], one["cr4"], one["efer"]) for one in vmcs] == [
        ("0x80050033", "0x1234000", "0x6f0", "0xd00"),
        ("0x60000010", "0x0", "0x0", "0x0"),
    ]
    client.delete(url)


def test_what_is_printed(load: Callable[..., tuple[int, str]], client: ContractClient) -> None:
    status, said = load(CORE, "--name", "guest")
    assert status == 0, said
    assert "  guest\n" in said and "slot 1: 0x100000 to 0x200fff" in said
    assert "1.6 MiB of elf" in said and "160 pages are not zero" in said and "CR3 0x1234000" in said
    client.delete(f"/v1/vms/{said.split()[0]}")


def test_a_known_machine_gets_the_slots_that_it_lacks(
    load: Callable[..., tuple[int, str]], client: ContractClient, make_vm: Callable[..., str]
) -> None:
    url = make_vm(memory_slots=[{"slot": 1, "gpa": 0, "size": 0x80000}, {"slot": 0, "gpa": 0x101000, "size": PAGE}])
    status, said = load(CORE, "--vm", url.rpartition("/")[2])
    assert status == 0 and "the image tells of 2 vCPUs, the machine has 1" in said
    slots = client.get(f"{url}/memory-slots").json()["memory_slots"]
    assert [(slot["slot"], slot["gpa"], slot["size"]) for slot in slots] == [
        (0, "0x101000", "0x1000"),
        (1, "0x0", "0x80000"),
        (2, "0x80000", "0x1f000"),
        (3, "0x100000", "0x1000"),
        (4, "0x102000", "0xff000"),
    ]
    assert client.get(f"{url}/vcpus/0/vmcs").json()["cr3"] == "0x1234000"


def test_raw_and_lime(load: Callable[..., tuple[int, str]], client: ContractClient) -> None:
    for content, options, slots in (
        (b"raw", ("--gpa", "0x5000"), [("0x5000", "0x1000")]),
        (b"raw" * PAGE, ("--format", "raw"), [("0x0", "0x3000")]),
        (
            lime((0x1000, b"a" * 100), (0x2000, b"b"), (1 << 47, b"c")),
            (),
            [("0x1000", "0x2000"), ("0x800000000000", "0x1000")],
        ),
        (zstandard.compress(lime((0x1000, b"a" * 9 * MIB))), ("--no-registers",), [("0x1000", "0x900000")]),
    ):
        status, said = load(content, *options, "--json")
        assert status == 0, said
        found = json.loads(said)
        assert [(slot["gpa"], slot["size"]) for slot in found["memory_slots"]] == slots
        client.delete(f"/v1/vms/{found['vm']}")


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (CORE[:-1], (), "the segment of GPA 0x100000 to 0x200fff should end at byte"),
        (lime((0, b"a" * MIB))[:-1], (), "should end at byte"),
        (gzip.compress(CORE)[:-20], (), "is it complete?"),
        (zstandard.compress(CORE)[:-20], (), ""),
        (b"", (), "must not be empty"),
        (b"KDUMP   ", (), "kdump-compressed"),
        (elf_core([(0, b"a")], machine=183), (), "x86"),
        (lime(*((gpa * 2 * PAGE, b"a") for gpa in range(600))), (), "512"),
        (b"raw", ("--profile", "kvm-1990"), "profile"),
        (b"raw", ("--gpa", "5k"), "must be a number"),
        (b"raw", ("--vm", "vm_0"), "404"),
        (b"a" * (65 * MIB), ("--vm", "busy"), "there is no machine called 'busy'"),
    ],
)
def test_what_is_refused_leaves_nothing(
    load: Callable[..., tuple[int, str]], client: ContractClient, content: bytes, options: tuple[str, ...], told: str
) -> None:
    before = machines(client)
    status, said = load(content, *options)
    assert status in (1, 2, 6) and told in " ".join(said.split()), said
    assert machines(client) == before


def test_a_refused_upload_takes_its_slots_along(
    load: Callable[..., tuple[int, str]], client: ContractClient, make_vm: Callable[..., str]
) -> None:
    url = make_vm(require_match=True, memory_slots=[{"slot": 0, "gpa": 0, "size": MIB}])
    status, said = load(b"a", "--vm", url.rpartition("/")[2])
    assert status == 1 and "428" in said
    assert len(client.get(f"{url}/memory-slots").json()["memory_slots"]) == 1


def test_ranges_become_pages() -> None:
    assert slots_of([(0x1FFF, 2), (0x3000, 1), (0x5001, 0x1000)]) == [(0x1000, 0x3000), (0x5000, 0x2000)]
    assert beside([(0, 10), (20, 10)], [(2, 3), (8, 14), (29, 9)]) == [(0, 2), (5, 3), (22, 7)]
    assert beside([(5, 5)], [(0, 100)]) == [] and beside([(5, 5)], []) == [(5, 5)]
