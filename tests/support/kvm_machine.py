"""A machine of KVM whose accesses are known, and a guest whose own KVM runs it: what its events say of it.

The guest is Debian's kernel in QEMU's emulation of a processor with SVM, so no KVM is needed outside.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

from capture.guest import busybox, fetch_files, initramfs_of, kernel_package

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "kvm-guest"
SOURCE = Path(__file__).with_suffix(".c")
GCC, QEMU, TRACE_CMD = shutil.which("gcc"), shutil.which("qemu-system-x86_64"), shutil.which("trace-cmd")

_READ, _WRITE, _EXECUTE = range(3)
# (address, bytes, read or write) of what belongs to no memory, in order, and what is read or written.
MMIO = (
    (0x9000, 1, _WRITE, 0x5A),
    (0x9004, 2, _WRITE, 0x1234),
    (0x9008, 4, _WRITE, 0x12345678),
    (0x9000, 2, _READ, 0),
    (0x9010, 4, _READ, 0),
    (0x9010, 4, _WRITE, 1),
)
# (instruction, address, access) of the faults that give the machine its memory, and of those that it has none for.
FAULTS = (
    (0x1000, 0x1000, _EXECUTE),
    (0x1002, 0x4000, _WRITE),
    (0x1005, 0x5080, _WRITE),
    (0x1008, 0x6000, _READ),
    (0x100D, 0x9000, _WRITE),
    (0x1010, 0x9004, _WRITE),
    (0x1016, 0x9008, _WRITE),
    (0x101F, 0x9000, _READ),
    (0x1022, 0x9010, _READ),
)

_MODULES = ("irqbypass", "ccp", "kvm", "kvm-amd")
_EVENTS = ("kvm_mmio", "kvm_page_fault", "kvm_exit")
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /dev /sys /tmp
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t tracefs nodev /sys/kernel/tracing
for module in {" ".join(_MODULES)}; do insmod /modules/$module.ko; done
for port in 1 2; do stty raw < /dev/ttyS$port; done
cd /sys/kernel/tracing
for event in {" ".join(_EVENTS)}; do echo 1 > events/kvm/$event/enable; done
kvm_machine && echo ran
cat trace > /dev/ttyS1
for event in {" ".join(_EVENTS)}; do echo 0 > events/kvm/$event/enable; done
if [ -e /bin/trace-cmd ]; then
    trace-cmd record -q -o /tmp/trace.dat {" ".join(f"-e kvm:{name}" for name in _EVENTS)} /bin/kvm_machine
    cat /tmp/trace.dat > /dev/ttyS2
fi
poweroff -f
"""


def compiled(folder: Path) -> Path:
    """The program, which needs no library."""
    program = folder / "kvm_machine"
    subprocess.run([str(GCC), "-O1", "-static", "-o", str(program), str(SOURCE)], check=True, timeout=60)
    return program


def traced_in_guest(folder: Path) -> tuple[Path, Path]:
    """The text of tracefs, and a trace.dat, which is empty without trace-cmd. Fetches Debian packages: CaptureError."""
    initramfs, text, binary = folder / "initramfs.gz", folder / "trace.txt", folder / "trace.dat"
    initramfs.write_bytes(initramfs_of({"init": _INIT.encode(), **_kernel_modules(), **_programs(folder)}))
    machine = "qemu-system-x86_64 -M pc,accel=tcg -cpu qemu64,+svm,+npt -m 128 -nodefaults -vga none -display none"
    files = ("-kernel", FOLDER / "vmlinuz", "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 nokaslr")
    ports = ("-serial", "stdio", "-serial", f"file:{text}", "-serial", f"file:{binary}")
    command = [*map(str, (*machine.split(), "-no-reboot", *files, *ports))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout + done.stderr
    return text, binary


def _kernel_modules() -> dict[str, bytes]:
    """Those of KVM by their paths in the guest, some of which are compressed in packages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = {f"{name}.ko*": FOLDER / f"{name}.ko" for name in _MODULES}
    kernel = FOLDER / "vmlinuz"
    if not all(path.exists() for path in (*wanted.values(), kernel)):
        fetch_files(FOLDER, kernel_package(), {**wanted, "boot/vmlinuz-*": kernel})
    contents = {f"modules/{path.name}": path.read_bytes() for path in wanted.values()}
    return {name: lzma.decompress(data) if data[:4] == b"\xfd7zX" else data for name, data in contents.items()}


def _programs(folder: Path) -> dict[str, bytes]:
    programs = {"bin/busybox": busybox(FOLDER), "bin/kvm_machine": compiled(folder).read_bytes()}
    if TRACE_CMD is not None:
        listed = subprocess.run(["ldd", TRACE_CMD], check=True, capture_output=True, text=True, timeout=60).stdout
        libraries = [word for word in listed.split() if word.startswith("/")]
        programs["bin/trace-cmd"] = Path(TRACE_CMD).read_bytes()
        programs |= {path.removeprefix("/"): Path(path).read_bytes() for path in libraries}
    return programs
