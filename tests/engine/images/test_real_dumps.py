"""Memory of a guest in long mode as QEMU itself writes it into dumps and shares it, where QEMU is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.images import open_image
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.trace.single import AccessRequest
from tests.engine.builders import READ, WRITE, behind

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")

RAM = 16 << 20
# A boot sector: page tables at 0x1000 that map the first 2 MiB to themselves, PAE, EFER.LME and NXE, a GDT, CR0.PG and
# PE, a jump to 64-bit code that stores 0x1122334455667788 at 0x5008 and halts.
BOOT = bytes.fromhex(
    "fa31c08ed8c70600100320c70600200330c7060030830066b8001000000f22d866b8200000000f22e066b9800000c00f32660d000900000f30660f"
    "0116787c66b8110000800f22c0ea4d7c080048b88877665544332211488904"
    "2508500000f4ebfd660f1f440000000000000000000000000000009b20000f00687c0000"
)
STORED = (0x1122334455667788).to_bytes(8, "little")


class Guest:
    """A QEMU that is spoken to by QMP."""

    def __init__(self, folder: Path) -> None:
        assert QEMU is not None
        disk, place, self.ram = folder / "boot.img", folder / "qmp", folder / "ram"
        disk.write_bytes(BOOT.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
        command = [QEMU, "-accel", "tcg", "-m", "16", "-smp", "2", "-display", "none", "-nodefaults", "-no-reboot"]
        command += ["-object", f"memory-backend-file,id=ram,size=16M,mem-path={self.ram},share=on"]
        command += ["-machine", "pc,memory-backend=ram", "-drive", f"file={disk},format=raw,if=ide"]
        command += ["-qmp", f"unix:{place},server=on,wait=off"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._socket = socket.socket(socket.AF_UNIX)
        _until(lambda: self._socket.connect_ex(str(place)) == 0)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            reply = json.loads(self._lines.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    def end(self) -> None:
        self._lines.close()
        self._socket.close()
        self.process.kill()
        self.process.wait()


def _until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("qemu")
    made = Guest(folder)
    try:
        memory = folder / "five"

        def stored() -> bool:
            made.ask("pmemsave", val=0x5008, size=8, filename=str(memory))
            return memory.read_bytes() == STORED

        _until(stored)
        made.ask("stop")
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("paging", [False, True])
def test_a_dump_is_the_memory_and_the_registers(guest: Guest, tmp_path: Path, paging: bool) -> None:
    core, raw = tmp_path / "core", tmp_path / "raw"
    guest.ask("dump-guest-memory", paging=paging, protocol=f"file:{core}")
    guest.ask("pmemsave", val=0, size=RAM, filename=str(raw))
    with core.open("rb") as file:
        seen = open_image("auto", file)
        seen.survey()
    ranges = seen.ranges.all()
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(n, gpa, size) for n, (gpa, size) in enumerate(ranges)])
    with core.open("rb") as file:
        image = open_image("auto", file)
        loaded = vm.load_image(image)
    assert image.format == "elf" and image.ranges.all() == ranges and image.vcpus == seen.vcpus
    first, second = image.vcpus
    assert (first.cr0 & 0x80000001, first.cr3, first.cr4, first.efer) == (0x80000001, 0x1000, 0x20, 0xD00)
    assert 0x7C00 <= first.rip < 0x7E00
    assert second.cr0 & 0x80000000 == 0 and second.efer == 0
    # What was halted has its tables and what it stored where they were.
    assert vm.read_memory(0x5008, 8) == STORED and vm.read_memory(0x7C00, 64) == BOOT[:64]
    memory = raw.read_bytes()
    for gpa, size in ranges:
        if gpa + size <= RAM and gpa != 0xA0000:
            assert vm.read_memory(gpa, min(size, 0xA0000)) == memory[gpa : gpa + min(size, 0xA0000)]
    assert loaded.size == sum(size for _, size in ranges)
    vm.vcpus.set_vmcs(0, {"cr0": first.cr0, "cr3": first.cr3, "cr4": first.cr4, "efer": first.efer})
    assert vm.vcpus.vmcs(0)["cr3"] == 0x1000


def test_the_memory_of_a_guest_that_runs_is_read_where_it_is(guest: Guest) -> None:
    """Its page tables are walked as they are in the file that QEMU shares, and only what is marked is copied."""
    guest.ask("cont")
    try:
        vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, RAM, backing=behind(guest.ram))])
        assert vm.read_memory(0x5008, 8) == STORED and vm.read_memory(0x7C00, 64) == BOOT[:64]
        assert vm.counters()["frames_memory"] == 0
        vm.vcpus.set_vmcs(0, {"cr0": 0x80000011, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00})
        assert vm.access(AccessRequest(None, 8, READ, gva=0x5008)).data == STORED
        vm.access(AccessRequest(None, 8, WRITE, gva=0x5008, data=bytes(8)))
        assert vm.read_memory(0x5008, 8) == bytes(8) and guest.ram.read_bytes()[0x5008:0x5010] == STORED
    finally:
        guest.ask("stop")
