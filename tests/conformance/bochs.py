"""Builds the conformance program, runs it under Bochs without a display, and reads what it prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import layout
from .vectors import SECTOR, Event, Outcome, Vector, encode

GUEST = Path(__file__).parent / "guest"
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/vgabios/vgabios.bin")
DISPLAYS = "/usr/lib", "*/bochs/plugins/libbx_sdl2*.so"
BEGIN, END = "SUBPAGE-CONFORMANCE-BEGIN", "SUBPAGE-CONFORMANCE-END"

# One BIOS read loads the program; a disk whose size is no multiple of a cylinder is refused.
PAYLOAD_LIMIT = 127 * SECTOR
CYLINDER = 16 * 63 * SECTOR

COMPILE = (
    *("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static"),
    *("-mno-red-zone", "-mgeneral-regs-only", "-mcmodel=small", "-fno-pic", "-no-pie", "-fno-stack-protector"),
    *("-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns"),
    *("-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"),
)

CONFIGURATION = f"""\
display_library: sdl2
romimage: file={BIOS}
vgaromimage: file={VGA_BIOS}
cpu: model=corei7_icelake_u, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest={layout.RAM_SIZE >> 20}, host={layout.RAM_SIZE >> 20}
ata0-master: type=disk, path=disk.img, mode=flat
boot: disk
port_e9_hack: enabled=1
log: bochs.log
panic: action=fatal
error: action=report
speaker: enabled=0
"""


class BochsError(RuntimeError):
    """Bochs or the program did not get to the end; the text says how far it got."""


@dataclass(frozen=True, slots=True)
class Processor:
    """What the emulated processor says it is: MAXPHYADDR and three VMX capability MSRs."""

    maxphyaddr: int
    vmx_basic: int
    ept_vpid_cap: int
    procbased_ctls2: int


def missing_tools() -> str | None:
    """Why Bochs cannot run here, or None if it can."""
    lacking = [tool for tool in ("bochs-bin", "gcc", "nasm", "timeout") if shutil.which(tool) is None]
    lacking += [str(path) for path in (BIOS, VGA_BIOS) if not path.exists()]
    if not any(Path(DISPLAYS[0]).glob(DISPLAYS[1])):
        lacking.append("Bochs' SDL2 display library")
    if not lacking:
        return None
    packages = "bochs bochs-sdl bochsbios vgabios nasm gcc"
    return f"not installed: {', '.join(lacking)} (Debian: apt-get install --no-install-recommends {packages})"


def build(directory: Path) -> bytes:
    """Compile the program in ``directory`` and return boot sector and program, padded to whole sectors."""
    stubs, program, payload = directory / "stubs.o", directory / "program.elf", directory / "program.bin"
    _call(("nasm", "-f", "elf64", "-o", str(stubs), str(GUEST / "stubs.asm")))
    script = f"-Wl,-T,{GUEST / 'program.ld'}"
    _call((*COMPILE, script, "-o", str(program), str(stubs), str(GUEST / "main.c")))
    _call(("objcopy", "-O", "binary", str(program), str(payload)))
    code = payload.read_bytes()
    if len(code) > PAYLOAD_LIMIT:
        raise BochsError(f"program of {len(code)} bytes, at most {PAYLOAD_LIMIT} fit one BIOS read")
    sectors = -(-len(code) // SECTOR)
    boot = directory / "boot.bin"
    _call(("nasm", "-f", "bin", f"-DPAYLOAD_SECTORS={sectors}", "-o", str(boot), str(GUEST / "boot.asm")))
    return boot.read_bytes() + code.ljust(sectors * SECTOR, b"\0")


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BochsError(f"{' '.join(command)}\n{done.stderr}")


def run(
    program: bytes, vectors: Sequence[Vector], directory: Path, seconds: int = 300
) -> tuple[Processor, list[Outcome]]:
    """Run the vectors in a machine of their own; returns what the processor is and one outcome per vector.

    Raises BochsError unless the program printed its end marker and a line for every vector. The exit status says
    nothing: powering off is a fatal panic to Bochs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    disk = program + encode(vectors)
    (directory / "disk.img").write_bytes(disk.ljust(-(-len(disk) // CYLINDER) * CYLINDER, b"\0"))
    (directory / "bochsrc").write_text(CONFIGURATION)
    (directory / "debugger").write_text("continue\nquit\n")
    command = ("timeout", str(seconds), "bochs-bin", "-q", "-f", "bochsrc", "-rc", "debugger")
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    with (directory / "out.txt").open("wb") as out, (directory / "err.txt").open("wb") as err:
        subprocess.run(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False
        )
    return parse((directory / "out.txt").read_text("latin-1"), vectors)


def parse(output: str, vectors: Sequence[Vector]) -> tuple[Processor, list[Outcome]]:
    """Read the program's lines between its markers."""
    found = re.search(f"{BEGIN}\n(.*)\n{END}\n", output, re.DOTALL)
    if found is None:
        raise BochsError(f"no complete run in Bochs' output; it ends with:\n{output[-1000:]}")
    first, *lines = found[1].split("\n")
    processor = Processor(*(int(field, 16) for field in first.split()[1:]))
    if len(lines) != len(vectors):
        raise BochsError(f"{len(lines)} outcomes for {len(vectors)} vectors")
    pairs = enumerate(zip(lines, vectors, strict=True))
    return processor, [_outcome(line, number, vector) for number, (line, vector) in pairs]


def _outcome(line: str, number: int, vector: Vector) -> Outcome:
    name, tag, *fields = line.split()
    if int(name, 16) != number:
        raise BochsError(f"outcome {number} is out of order: {line}")
    if tag == "f":
        return Outcome(Event.ENTRY_FAILED, reason=int(fields[0], 16))
    landed, changed = int(fields[0], 16), _changed(fields[1], vector)
    numbers = [int(field, 16) for field in fields[2:]]
    if tag == "k":
        return Outcome(Event.COMPLETED, landed=landed, changed=changed)
    if tag == "e":
        reason, error_code, address = numbers
        return Outcome(Event.EXCEPTION, reason, gla=address, error_code=error_code, landed=landed, changed=changed)
    reason, qualification, gpa, gla = numbers
    return Outcome(Event.EXIT, reason, qualification, gpa, gla, landed=landed, changed=changed)


def _changed(text: str, vector: Vector) -> tuple[tuple[int, int], ...]:
    if text == "-":
        return ()
    addresses = list(vector.memory())
    pairs = (change.split(":") for change in text.split(","))
    return tuple(sorted((addresses[int(index, 16)], int(value, 16)) for index, value in pairs))
