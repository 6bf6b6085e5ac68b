"""Traces that tools write here, of programs whose accesses are known; skipped where a tool is missing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.arch import access as acc
from engine.trace.readers import open_trace
from tests.support.real_tools import ACCESSES, EXECLOG, HALT, QEMU, qemu, rom

VALGRIND, GCC, BOCHS = shutil.which("valgrind"), shutil.which("gcc"), shutil.which("bochs-bin")
VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
DISPLAYS = "/usr/lib", "*/bochs/plugins/libbx_sdl2*.so"

Found = list[tuple[int, int, int]]


def read(path: Path, format: str) -> Found:
    """(address, size, access) of all data that a file has, which must be recognised."""
    reader = open_trace("auto", io.BytesIO(path.read_bytes()))
    found: Found = []
    for chunk in reader:
        word = chunk.records[:, 1]
        columns = chunk.records[:, 0], word & np.uint64(0xFFFF), word >> np.uint64(16) & np.uint64(0xFF)
        found += zip(*(column.tolist() for column in columns), strict=True)
    assert reader.taken is not None and reader.taken.format == format
    return [one for one in found if one[2] != acc.EXECUTE]


@pytest.mark.jit
@pytest.mark.skipif(VALGRIND is None or GCC is None, reason="needs valgrind and gcc")
def test_lackey(tmp_path: Path) -> None:
    """A program stores 64 words to a page of its own, then adds 1 to every eighth."""
    source, program, trace = tmp_path / "w.c", tmp_path / "w", tmp_path / "trace.txt"
    source.write_text(
        "_Alignas(4096) volatile unsigned long table[512];\n"
        "int main(void) { for (int i = 0; i < 64; i++) table[i] = i; for (int i = 0; i < 64; i += 8) table[i]++; }\n"
    )
    subprocess.run([str(GCC), "-O1", "-no-pie", "-o", str(program), str(source)], check=True, timeout=60)
    listed = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True, timeout=60).stdout
    (table,) = (int(line.split()[0], 16) for line in listed.splitlines() if line.endswith(" table"))
    command = [str(VALGRIND), "--tool=lackey", "--trace-mem=yes", f"--log-file={trace}", str(program)]
    subprocess.run(command, check=False, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    here = [one for one in read(trace, "lackey") if table <= one[0] < table + 4096]
    writes = [(address - table, size) for address, size, access in here if access == acc.WRITE]
    assert writes == [(8 * n, 8) for n in range(64)] + [(64 * n, 8) for n in range(8)]


@pytest.mark.skipif(QEMU is None or not EXECLOG.exists(), reason="needs qemu-system-x86_64 and build/execlog")
def test_execlog(tmp_path: Path) -> None:
    """It has no sizes: 8 bytes are assumed of each. A read-modify-write is two accesses of one instruction."""
    trace = tmp_path / "trace.txt"
    qemu(tmp_path, "-accel", "tcg", "-plugin", EXECLOG, "-d", "plugin", "-D", trace)
    assert read(trace, "execlog") == [(address, 8, access) for address, _, access in ACCESSES]


@pytest.mark.skipif(
    BOCHS is None or not VGA_BIOS.exists() or not any(Path(DISPLAYS[0]).glob(DISPLAYS[1])),
    reason="needs bochs, bochs-sdl and vgabios",
)
def test_bochs(tmp_path: Path) -> None:
    rom(tmp_path)
    (tmp_path / "bochsrc").write_text(
        f"display_library: sdl2\nromimage: file=rom.bin\nvgaromimage: file={VGA_BIOS}\n"
        "memory: guest=16, host=16\nlog: bochs.log\nerror: action=report\npanic: action=report\n"
    )
    (tmp_path / "debugger").write_text(f"trace-mem on\nlbreak {HALT:#x}\ncontinue\nquit\n")
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    trace = tmp_path / "trace.txt"
    with trace.open("wb") as out:
        subprocess.run(
            ["timeout", "240", str(BOCHS), "-q", "-f", "bochsrc", "-rc", "debugger"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    assert read(trace, "bochs") == list(ACCESSES)
