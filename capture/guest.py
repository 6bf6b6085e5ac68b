"""A small guest of Debian's kernel and busybox, made on the spot: what ``make guest-demo`` and its test boot."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from capture.errors import CaptureError

T = TypeVar("T")

INIT = Path(__file__).parent / "guest_init.sh"
START = "__x64_sys_sync"
QEMU = "qemu-system-x86_64"
# The smallest kernel of Debian's: it needs the drivers of no real machine.
_KERNEL = "linux-image-cloud-amd64"
_SECONDS = 600

# What the guest's program /bin/crosses stores, and where: four bytes of each of two pages. It loads, too.
CROSSING = 0x1122334455667788
CROSSING_GVA = 0x401FFC
CROSSING_PC, CROSSING_LOAD_PC = 0x400082, 0x40008A


@dataclass(frozen=True, slots=True)
class SmallGuest:
    """Files of a guest: a kernel, an initramfs, and the kernel's symbols as it shows them itself."""

    kernel: Path
    initramfs: Path
    symbols: Path
    qemu: str = QEMU

    def command(self, *more: str, append: str = "") -> list[str]:
        """QEMU's command line; the guest's console is standard output."""
        return _command(self.qemu, self.kernel, self.initramfs, ("-serial", "stdio", *more), append)


def small_guest(folder: Path, qemu: str = QEMU) -> SmallGuest:
    """The guest, made in ``folder`` unless it is there. Fetches Debian packages. Raises CaptureError."""
    folder.mkdir(parents=True, exist_ok=True)
    kernel, initramfs, symbols = folder / "vmlinuz", folder / "initramfs.gz", folder / "kallsyms"
    if not kernel.exists():
        _known(lambda: fetch_files(folder, kernel_package(_KERNEL), {"boot/vmlinuz-*": kernel}))
    programs = {"bin/busybox": _known(lambda: busybox(folder)), "bin/crosses": _crosses(), "init": INIT.read_bytes()}
    archive = initramfs_of(programs)
    if not initramfs.exists() or initramfs.read_bytes() != archive:  # another guest may just be reading it
        initramfs.with_suffix(".new").write_bytes(archive)
        initramfs.with_suffix(".new").replace(initramfs)
    if not symbols.exists():
        raw = folder / "kallsyms.gz"
        serial = ("-serial", "file:/dev/null", "-serial", f"file:{raw}")
        run(_command(qemu, kernel, initramfs, serial, "subpage=symbols"))
        try:
            text = gzip.decompress(raw.read_bytes())
        except (OSError, EOFError) as error:
            raise CaptureError(f"{raw}: the guest did not show its symbols: {error}") from None
        if b" modprobe_path\n" not in text:
            raise CaptureError(f"{raw}: the symbols that the guest shows have no modprobe_path")
        symbols.write_bytes(text)
        raw.unlink()
    return SmallGuest(kernel, initramfs, symbols, qemu)


def _command(qemu: str, kernel: Path, initramfs: Path, more: Sequence[str], append: str) -> list[str]:
    machine = "-M pc,accel=tcg -m 512M -nodefaults -vga none -display none -no-reboot"
    words = f"console=ttyS0 nokaslr quiet panic=-1 no_timer_check {append}".strip()
    files = ("-kernel", str(kernel), "-initrd", str(initramfs), "-append", words)
    return [qemu, *machine.split(), *files, *more]


def _known(step: Callable[[], T]) -> T:
    """Do what asks apt, once more where what apt knows is too old, or nothing. Raises CaptureError."""
    try:
        return step()
    except CaptureError:
        if os.geteuid() != 0:
            raise
        run(["apt-get", "update"])
        return step()


def kernel_package(newest: str = "linux-image-amd64") -> str:
    """The name of the package that has the kernel which the package ``newest`` stands for. Raises CaptureError."""
    package = run(["apt-cache", "depends", newest]).stdout
    names = [line.split()[-1] for line in package.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise CaptureError(f"apt knows no package {newest}: apt-get update, on Debian")
    return names[0]


def busybox(folder: Path) -> bytes:
    """The program, which needs no library; fetched unless ``folder`` has it. Raises CaptureError."""
    program = folder / "busybox"
    if not program.exists():
        fetch_files(folder, "busybox-static", {"bin/busybox": program})
    return program.read_bytes()


def fetch_files(folder: Path, package: str, wanted: Mapping[str, Path]) -> None:
    """Fetch a package, and take files out of it, by patterns of their names. Raises CaptureError."""
    apart = folder / "package"
    shutil.rmtree(apart, ignore_errors=True)
    apart.mkdir()
    run(["apt-get", "download", package], apart)
    (archive,) = apart.glob("*.deb")
    run(["dpkg-deb", "-x", archive.name, "content"], apart)
    for pattern, target in wanted.items():
        found = [
            path for path in sorted((apart / "content").rglob(pattern)) if path.is_file() and not path.is_symlink()
        ]
        if not found:
            raise CaptureError(f"the package {package} has no {pattern}")
        found[0].replace(target)
    shutil.rmtree(apart)


def run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a program says that ends well. Raises CaptureError."""
    try:
        return subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_SECONDS
        )
    except FileNotFoundError:
        rule = "there is no such program; the demonstration needs Debian or Ubuntu"
        raise CaptureError(f"{command[0]}: {rule}") from None
    except subprocess.CalledProcessError as error:
        raise CaptureError(f"{' '.join(command)}: status {error.returncode}: {error.stderr.strip()}") from None
    except subprocess.TimeoutExpired:
        raise CaptureError(f"{command[0]} did not end within {_SECONDS} s") from None


def initramfs_of(programs: Mapping[str, bytes]) -> bytes:
    """A compressed initramfs (cpio, "newc"): programs by their paths, and the first process's console."""
    above = {str(folder) for path in programs for folder in Path(path).parents} - {"."}
    folders = [(name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in sorted({*above, "dev", "proc"})]
    files = [(name, stat.S_IFREG | 0o755, data, (0, 0)) for name, data in programs.items()]
    console = ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))
    out = bytearray()
    for number, (name, mode, data, device) in enumerate((*folders, *files, console, ("TRAILER!!!", 0, b"", (0, 0)))):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return gzip.compress(bytes(out), 1, mtime=0)


def _crosses() -> bytes:
    """A program (ELF) that makes one store over two pages, says so with a byte, and stays with its memory."""
    code = b"\x48\xb8" + struct.pack("<Q", CROSSING)  # mov rax, CROSSING
    code += b"\x48\x89\x04\x25" + struct.pack("<I", CROSSING_GVA)  # mov [CROSSING_GVA], rax
    code += b"\x48\x8b\x1c\x25" + struct.pack("<I", CROSSING_GVA - 0x10)  # mov rbx, [...]
    code += bytes.fromhex("b801000000 bf01000000 be00004000 ba01000000 0f05")  # write(1, 0x400000, 1)
    code += bytes.fromhex("b822000000 0f05 ebf7")  # pause(), for ever
    base, ends = 0x400000, 0x78 + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 0x78, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, ends, 0x3000, 0x1000)
    return header + code
