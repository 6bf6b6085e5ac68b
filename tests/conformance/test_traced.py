"""Traces that the tools themselves make here, where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.arch import access as acc
from engine.trace.readers import open_trace

from . import bochs

# Stores 0x5a at 0x4000 + 128 n for n < 8, 0x1234 at 0x5000, 0x5a at 0x5008; adds 1 at 0x5000; pushes 0x5a below 0x7000.
BOOT_SECTOR = bytes.fromhex(
    "fa 31c0 8ed8 8ed0 bc0070 bf0040 b05a 8805 81c78000 81ff0044 75f4 66c706005034120000 a30850 66ff060050 50 f4 ebfd"
)
STORES = [
    *((0x4000 + 128 * n, 1, acc.WRITE, 0x4000 + 128 * n) for n in range(8)),
    *((0x5000, 4, acc.WRITE, 0x5000), (0x5008, 2, acc.WRITE, 0x5008)),
    *((0x5000, 4, acc.READ, 0x5000), (0x5000, 4, acc.WRITE, 0x5000)),
    (0x6FFE, 2, acc.WRITE, 0x6FFE),
]

NO_BOCHS = bochs.missing_tools()


@pytest.mark.skipif(NO_BOCHS is not None, reason=f"Bochs: {NO_BOCHS}")
def test_bochs(tmp_path: Path) -> None:
    disk = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa"
    (tmp_path / "disk.img").write_bytes(disk.ljust(bochs.CYLINDER, b"\0"))
    (tmp_path / "bochsrc").write_text(bochs.CONFIGURATION)
    (tmp_path / "debugger").write_text("pb 0x7c00\nc\ntrace-mem on\ns 43\nquit\n")
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    with (tmp_path / "trace.txt").open("wb") as out:
        command = ("timeout", "250", "bochs-bin", "-q", "-f", "bochsrc", "-rc", "debugger")
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=tmp_path, env=environment, check=False, **streams)
    found = []
    with (tmp_path / "trace.txt").open("rb") as file:
        reader = open_trace("auto", file)
        for chunk in reader:
            assert chunk.gva is not None
            for (gpa, word), gva in zip(chunk.records.tolist(), chunk.gva.tolist(), strict=True):
                found.append((gpa, word & 0xFFFF, word >> 16 & 0xFF, gva))
    assert reader.taken is not None and reader.taken.format == "bochs"
    assert found == STORES


def perf(*arguments: str) -> str | None:
    """What perf prints; None where it is not there or may not do it."""
    if shutil.which("perf") is None:
        return None
    done = subprocess.run(("perf", *arguments), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.parametrize(
    "fields", ["comm,tid,time,event,addr,ip", "comm,tid,cpu,time,period,event,addr,ip", "tid,event,addr"]
)
def test_perf_script(tmp_path: Path, fields: str) -> None:
    data = str(tmp_path / "perf.data")
    if perf("record", "-o", data, "-e", "page-faults", "-c", "1", "-d", "-a", "true") is None:
        pytest.skip("perf: not installed, or it may not record")
    text = perf("script", "-i", data, "-F", fields)
    addresses = perf("script", "-i", data, "-F", "addr")
    if text is None or addresses is None:
        pytest.skip(f"perf has no fields {fields} of these samples")
    (tmp_path / "trace.txt").write_text(text)
    with (tmp_path / "trace.txt").open("rb") as file:
        found = [int(gpa) for chunk in open_trace("auto", file) for gpa in chunk.records[:, 0]]
    assert found == [int(address, 16) for address in addresses.split()] and len(found) > 10
