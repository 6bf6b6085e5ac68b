"""Traces that tools write here, of programs whose accesses are known; skipped where a tool is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.arch import access as acc
from tests.support.execlog import BUILDABLE, SourceError, execlog
from tests.support.kvm_machine import FAULTS, MMIO, compiled
from tests.support.real_tools import ACCESSES, HALT, QEMU, accesses_of, qemu, rom

VALGRIND, GCC, BOCHS = shutil.which("valgrind"), shutil.which("gcc"), shutil.which("bochs-bin")
UNSHARE, PERF = shutil.which("unshare"), shutil.which("perf")
ROOT = os.geteuid() == 0
VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
DISPLAYS = "/usr/lib", "*/bochs/plugins/libbx_sdl2*.so"

Found = list[tuple[int, int, int]]


def read(path: Path, format: str) -> Found:
    """(address, size, access) of all data that a file has."""
    return [(one.gpa, one.size, one.access) for one in accesses_of(path, format)[0] if one.access != acc.EXECUTE]


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


@pytest.mark.skipif(QEMU is None or not BUILDABLE, reason="needs qemu-system-x86_64 of a package, and a compiler")
def test_execlog(tmp_path: Path) -> None:
    """It has no sizes: 8 bytes are assumed of each. A read-modify-write is two accesses of one instruction."""
    try:
        plugin = execlog()
    except SourceError as error:
        pytest.skip(str(error))
    trace = tmp_path / "trace.txt"
    qemu(tmp_path, "-accel", "tcg", "-plugin", plugin, "-d", "plugin", "-D", trace)
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


# In a name space of its own, and an instance of tracefs: the machine's mounts and its own trace stay as they are.
_TRACED = """
mount -t tracefs nodev /sys/kernel/tracing && instance=/sys/kernel/tracing/instances/subpage-$$ || exit 77
mkdir $instance || exit 77
for event in kvm_mmio kvm_page_fault kvm_exit; do echo 1 > $instance/events/kvm/$event/enable || failed=77; done
[ -n "$failed" ] || $1 || failed=77
cat $instance/trace > $2
rmdir $instance
exit $failed
"""
# The same events by perf, which reads their formats from tracefs.
_SAMPLED = """
mount -t tracefs nodev /sys/kernel/tracing || exit 77
perf record -q -e kvm:kvm_mmio -e kvm:kvm_page_fault -o $2.data $1 || exit 77
perf script -i $2.data > $2
"""


@pytest.mark.skipif(
    UNSHARE is None or GCC is None or not ROOT or not os.access("/dev/kvm", os.W_OK),
    reason="needs root, gcc and /dev/kvm",
)
@pytest.mark.parametrize(
    "script", [_TRACED, pytest.param(_SAMPLED, marks=pytest.mark.skipif(PERF is None, reason="needs perf"))]
)
def test_events_of_kvm(script: str, tmp_path: Path) -> None:
    """Accesses to memory that nobody has are all there; of others those that found no mapping, if any."""
    program, trace = compiled(tmp_path), tmp_path / "trace.txt"
    command = [str(UNSHARE), "--mount", "sh", "-c", script, "sh", str(program), str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip(f"KVM's events cannot be had: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    found, _ = accesses_of(trace, "ftrace")
    assert [(one.gpa, one.size, one.access) for one in found if not one.pc] == [one[:3] for one in MMIO]
    assert {(one.pc, one.gpa, one.access) for one in found if one.pc} <= set(FAULTS)


@pytest.mark.jit
@pytest.mark.skipif(PERF is None or GCC is None, reason="needs perf and gcc")
def test_page_faults_of_perf(tmp_path: Path) -> None:
    """A program stores to one word of each of 16 pages that it never touched: one fault each, in that order."""
    source, program, samples, trace = (tmp_path / name for name in ("w.c", "w", "perf.data", "trace.txt"))
    source.write_text(
        "_Alignas(4096) volatile char pages[16][4096];\n"
        "int main(void) { for (int i = 0; i < 16; i++) pages[i][128 * i] = 1; return 0; }\n"
    )
    subprocess.run([str(GCC), "-O1", "-no-pie", "-o", str(program), str(source)], check=True, timeout=60)
    listed = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True, timeout=60).stdout
    (pages,) = (int(line.split()[0], 16) for line in listed.splitlines() if line.endswith(" pages"))
    record = [str(PERF), "record", "-q", "-e", "page-faults", "-c", "1", "-d", "-o", str(samples), str(program)]
    done = subprocess.run(record, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"perf cannot record here: {done.stderr[-200:]}")
    with trace.open("wb") as out:
        script = [str(PERF), "script", "-i", str(samples), "-F", "comm,tid,time,event,addr,ip"]
        subprocess.run(script, stdout=out, check=True, timeout=60)
    found, _ = accesses_of(trace, "perf-script")
    here = [(one.gpa - pages, one.access) for one in found if pages <= one.gpa < pages + 16 * 4096]
    assert here == [(4096 * n + 128 * n, acc.WRITE) for n in range(16)]
