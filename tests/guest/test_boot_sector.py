"""A guest of 50 bytes in the QEMU that is installed: every store that it makes, and nothing else, is recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from capture.qmp import Qmp
from capture.recording import Recording, Wanted
from service.cli.app import app
from service.settings import Settings
from tests.support.qemu import QEMU
from tests.support.server import running
from tests.support.tools import tool
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(
        shutil.which(QEMU) is None or shutil.which("cc") is None,
        reason="needs qemu-system-x86_64 and a C compiler",
    ),
]

runner = CliRunner()
STORES = 1000
# At 0x7c00, 16-bit, interrupts off: 1,000 words from 0x8000 on, one over two pages, a load; then the power goes off.
CODE = bytes.fromhex(
    "fa 31c0 8ed8 8ec0"  # cli; xor ax, ax; mov ds, ax; mov es, ax
    "b9e803 bf0080"  # mov cx, 1000; mov di, 0x8000
    "890d 83c702 e2f9"  # mov [di], cx; add di, 2; loop
    "c706ff9f3412"  # mov word [0x9fff], 0x1234
    "a10080"  # mov ax, [0x8000]
    "ba0406 b80020 ef"  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: ACPI S5
    "f4 ebfd"  # hlt; jmp back
)
EXPECTED = [(0x8000 + 2 * n, 2, 0x7C0D) for n in range(STORES)] + [(0x9FFF, 1, 0x7C14), (0xA000, 1, 0x7C14)]


@pytest.fixture
def machine(tmp_path: Path) -> list[str]:
    disk = tmp_path / "disk.img"
    disk.write_bytes(CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    qemu = "-M pc,accel=tcg -m 16M -nodefaults -vga none -display none"
    return [QEMU, *qemu.split(), "-drive", f"file={disk},format=raw,if=ide"]


def test_a_guest_has_not_printed_while_the_question_about_its_store_stands(tmp_path: Path) -> None:
    """A store to a protected word, then a letter to a port: the vCPU waits between them, and the store has landed. Its
    RAM is a file that QEMU shares: the tool that is asked reads of the machine what QEMU says that the guest has."""
    disk, printed, policy, ram = (tmp_path / name for name in ("disk.img", "printed", "policy.json", "ram"))
    code = bytes.fromhex("fa31c08ed8 c70600803412 b058e6e9 ba0406b80020ef f4ebfd")
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    policy.write_text(json.dumps({"name": "policy", "objects": [{"name": "secret", "gpa": "0x8000", "size": 8}]}))
    qemu = [
        QEMU,
        *["-M", "pc,accel=tcg,memory-backend=ram", "-m", "16M", "-nodefaults", "-vga", "none", "-display", "none"],
        *["-object", f"memory-backend-file,id=ram,size=16M,mem-path={ram},share=on", "-S"],
    ]
    qemu += ["-drive", f"file={disk},format=raw,if=ide", "-debugcon", f"file:{printed}"]
    qemu += ["-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off"]
    with running(Settings(warm_up=False, memory_files=(ram,))) as server:
        command = [sys.executable, "-m", "service.cli", "live", "--server", server.url, "--policy", str(policy)]
        command += ["--start", "0x7c00", "--on-violation", "ask", "--json", "--", *qemu]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as live:
            try:
                until(lambda: bool(server.client.get("/v1/vms").json()["vms"]))
                vm = "/v1/vms/" + server.client.get("/v1/vms").json()["vms"][0]["id"]
                with tool(server, vm, timeout=120) as asked, socket.socket(socket.AF_UNIX) as control:
                    control.connect(str(tmp_path / "qmp"))
                    qmp = Qmp(control)
                    qmp.begin()
                    qmp.execute("cont")
                    question = asked.receive("violation", 120)
                    assert question["exit"]["objects"] == ["secret"]
                    time.sleep(0.3)
                    assert printed.read_bytes() == b""
                    assert "0x1234" in qmp.monitor("xp /1xh 0x8000")
                    for gpa in (0x7C00, 0x8000):  # its code, too
                        found = server.client.get(f"{vm}/memory?gpa={gpa:#x}&size=16").content
                        assert found.hex(" ") == bytes_at(qmp, gpa).hex(" ")
                    asked.answer(question, "allow")
                    assert asked.receive("resolved")["action"] == "allow"
                said, _ = live.communicate(timeout=120)
            finally:
                live.kill()
    assert (live.returncode, printed.read_bytes()) == (0, b"X")
    assert json.loads(said)["by_object"]["secret"]["violations"] == 1


def bytes_at(qmp: Qmp, gpa: int) -> bytes:
    """Sixteen bytes of guest RAM, as QEMU says."""
    lines = qmp.monitor(f"xp /16xb {gpa:#x}").splitlines()
    return bytes(int(word, 16) for line in lines for word in line.partition(":")[2].split())


@pytest.mark.parametrize("ends", ["resets", "migrates"])
def test_a_guest_that_is_not_there_any_more_is_told(ends: str, tmp_path: Path) -> None:
    """What was stored before is recorded. The one asks the keyboard's controller for a reset, the other one halts."""
    disk = tmp_path / "disk.img"
    code = bytes.fromhex("fa31c08ed8 c70600803412" + ("b0fee664" if ends == "resets" else "") + "f4ebfd")
    disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    qemu = [QEMU, "-M", "pc,accel=tcg", "-m", "16M", "-nodefaults", "-vga", "none", "-display", "none"]
    qemu += ["-drive", f"file={disk},format=raw,if=ide", "-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off"]
    stored = 0
    with Recording(qemu, Wanted(start_pc=0x7C00)) as recording, socket.socket(socket.AF_UNIX) as control:
        control.connect(str(tmp_path / "qmp"))
        for records in recording:
            stored += len(records)
            if ends == "migrates" and len(records):
                qmp = Qmp(control)
                qmp.begin()
                qmp.execute("migrate", uri="exec:cat >/dev/null")
        assert stored == 1
        assert recording.word.startswith({"resets": "the guest reset", "migrates": "the guest has migrated"}[ends])
        assert not recording.failed


def recorded(path: Path, machine: list[str], *options: str) -> str:
    result = runner.invoke(app, ["record", "-o", str(path), "--start", "0x7c00", *options, "--", *machine])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_store_is_recorded_and_no_load(machine: list[str], tmp_path: Path) -> None:
    path = tmp_path / "boot.parquet"
    assert f"{STORES + 2:,} stores to 3 pages" in recorded(path, machine)
    found = pq.read_table(path)
    names = ("gpa", "size", "pc")
    assert list(zip(*(found[name].to_pylist() for name in names), strict=True)) == EXPECTED
    assert found["gva"].to_pylist() == found["gpa"].to_pylist()
    assert b'"plugin_interface"' in found.schema.metadata[b"subpage.recording"]


def test_a_sample_has_one_of_so_many(machine: list[str], tmp_path: Path) -> None:
    """The last one of it is the store over two pages, whole."""
    assert "A sample: of every 10 stores" in recorded(tmp_path / "sample.parquet", machine, "--sample", "10")
    found = pq.read_table(tmp_path / "sample.parquet")["gpa"].to_pylist()
    assert found == [0x8000 + 2 * n for n in range(0, STORES, 10)] + [0x9FFF, 0xA000]


def test_two_recordings_are_one_file(machine: list[str], tmp_path: Path) -> None:
    digests = set()
    for name in ("one.parquet", "two.parquet"):
        recorded(tmp_path / name, [*machine, "-smp", "2"], "--max", "500")
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert pq.read_table(tmp_path / "two.parquet").num_rows == 500
