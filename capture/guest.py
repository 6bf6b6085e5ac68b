"""A small guest of Debian's kernel and busybox, made on the spot: what ``make guest-demo`` and its test boot."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capture.errors import CaptureError

INIT = Path(__file__).parent / "guest_init.sh"
START = "__x64_sys_sync"
_SECONDS = 600


@dataclass(frozen=True, slots=True)
class SmallGuest:
    """Files of a guest: a kernel, an initramfs, and the kernel's symbols as it shows them itself."""

    kernel: Path
    initramfs: Path
    symbols: Path

    def command(self, *more: str, append: str = "") -> list[str]:
        """QEMU's command line; the guest's console is standard output."""
        return _command(self.kernel, self.initramfs, ("-serial", "stdio", *more), append)


def small_guest(folder: Path) -> SmallGuest:
    """The guest, made in ``folder`` unless it is there. Fetches Debian packages. Raises CaptureError."""
    folder.mkdir(parents=True, exist_ok=True)
    kernel, initramfs, symbols = folder / "vmlinuz", folder / "initramfs.gz", folder / "kallsyms"
    if not kernel.exists():
        fetch_files(folder, kernel_package(), {"boot/vmlinuz-*": kernel})
    initramfs.write_bytes(initramfs_of({"init": INIT.read_bytes(), "bin/busybox": busybox(folder)}))
    if not symbols.exists():
        raw = folder / "kallsyms.raw"
        serial = ("-serial", "file:/dev/null", "-serial", f"file:{raw}")
        _run(_command(kernel, initramfs, serial, "subpage=symbols"))
        text = raw.read_bytes().replace(b"\r\n", b"\n")
        if b" modprobe_path\n" not in text:
            raise CaptureError(f"{raw}: the guest did not show its symbols")
        symbols.write_bytes(text)
        raw.unlink()
    return SmallGuest(kernel, initramfs, symbols)


def _command(kernel: Path, initramfs: Path, more: Sequence[str], append: str) -> list[str]:
    machine = "qemu-system-x86_64 -M pc,accel=tcg -m 512M -nodefaults -vga none -display none -no-reboot"
    words = f"console=ttyS0 nokaslr quiet panic=-1 {append}".strip()
    files = ("-kernel", str(kernel), "-initrd", str(initramfs), "-append", words)
    return [*machine.split(), *files, *more]


def kernel_package() -> str:
    """The name of the package that has Debian's newest kernel. Raises CaptureError."""
    package = _run(["apt-cache", "depends", "linux-image-amd64"]).stdout
    names = [line.split()[-1] for line in package.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise CaptureError("apt knows no package linux-image-amd64: apt-get update, on Debian")
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
    _run(["apt-get", "download", package], apart)
    (archive,) = apart.glob("*.deb")
    _run(["dpkg-deb", "-x", archive.name, "content"], apart)
    for pattern, target in wanted.items():
        found = [path for path in sorted((apart / "content").rglob(pattern)) if path.is_file()]
        if not found:
            raise CaptureError(f"the package {package} has no {pattern}")
        found[0].replace(target)
    shutil.rmtree(apart)


def _run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
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
