"""A QEMU under our eyes: its command line checked, the plugin added, stopped before the first instruction of the guest
until somebody has looked at its memory, and watched until it ends.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from capture.errors import CaptureError
from capture.qmp import Qmp, QmpClosed
from capture.ram import Backends, Backing, ram_ranges
from capture.ring import Ring

# Interface 1 tells where in a block of RAM a store landed. That is a guest-physical address only in the first block, as
# long as it has no part above 4 GiB.
MOST_RAM_OF_INTERFACE_1 = 3 << 30
_VERSION_SECONDS = 120  # a machine under load starts slowly
_QUIT_SECONDS = 10
_OTHER_ACCELERATORS = ("kvm", "xen", "hvf", "nvmm", "whpx")
# Options that take QEMU out of our hands, and why.
_REFUSED = {
    "daemonize": "QEMU must stay in the foreground to be watched",
    "incoming": "a guest that arrives by migration cannot be recorded from its beginning",
    "preconfig": "QEMU must be stopped before the guest runs, not before it has a machine",
}


@dataclass(frozen=True, slots=True)
class Program:
    """A QEMU as it is installed: where, and what it calls itself."""

    path: str
    version: str


@dataclass(frozen=True, slots=True)
class Guest:
    """What a guest is made of: bytes of RAM, where they are (first address and size), how many vCPUs, and what is
    behind each range of RAM. ``blocks``: how many parts of QEMU's own memory the ranges are of."""

    ram: int
    ranges: tuple[tuple[int, int], ...]
    vcpus: int
    interface: int
    backing: tuple[Backing, ...] = ()
    blocks: int = 1


def program_of(command: Sequence[str]) -> Program:
    """The QEMU that a command line starts, if it can be recorded. Raises CaptureError."""
    if not command:
        raise CaptureError("which guest? give QEMU's command line after --: -- qemu-system-x86_64 -m 1G …")
    path = shutil.which(command[0])
    if path is None:
        rule = f"{command[0]}: there is no such program; on Debian and Ubuntu: apt-get install qemu-system-x86"
        raise CaptureError(rule)
    _check_options(command[1:])
    found = re.search(r"QEMU emulator version (\S+)", _said(path, "--version"))
    if found is None:
        raise CaptureError(f"{command[0]}: is not a QEMU (it does not say which version it is)")
    if not re.search(r"^-plugin\b", _said(path, "-help"), re.MULTILINE):
        rule = "was built without TCG plugins (--enable-plugins), which the recorder is: Debian's has them"
        raise CaptureError(f"{command[0]}: {rule}")
    return Program(path, found[1])


def _said(path: str, option: str) -> str:
    try:
        done = subprocess.run(
            [path, option],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CaptureError(f"{path}: cannot be run: {error}") from None
    return done.stdout


def _check_options(options: Sequence[str]) -> None:
    """Refuse what would leave nothing to see, or nobody to see it."""
    for at, option in enumerate(options):
        if not option.startswith("-"):
            continue
        name = option.lstrip("-")
        value = options[at + 1] if at + 1 < len(options) else ""
        if name in _REFUSED:
            raise CaptureError(f"-{name}: {_REFUSED[name]}")
        wanted = None
        if name == "enable-kvm":
            wanted = "kvm"
        elif name == "accel":
            wanted = value.split(",")[0].removeprefix("accel=")
        elif name in ("M", "machine"):
            wanted = next((part[6:].split(":")[0] for part in value.split(",") if part.startswith("accel=")), None)
        if wanted in _OTHER_ACCELERATORS:
            told = f"-{name}" if name == "enable-kvm" else f"-{name} {value}"
            rule = f"under {wanted} the guest runs on the processor, where no plugin sees its stores: use -accel tcg"
            raise CaptureError(f"{told}: {rule}")
        if name == "m" and "maxmem=" in value:
            raise CaptureError(f"-m {value}: a guest whose memory can grow (maxmem=) cannot be recorded; leave it out")


class Qemu:
    """A QEMU process with the recorder in it, as a context manager: ended when the context is."""

    def __init__(
        self, program: Program, command: Sequence[str], plugin: Path, ring: Ring, line: socket.socket | None = None
    ) -> None:
        """With ``line`` the guest has one more serial line, its last one, whose other end that is."""
        self._ring = ring
        self._word: str | None = None
        self._off = False
        self._stays = "-S" in command
        ours, theirs = socket.socketpair()
        self._socket = ours
        added = [
            *("-plugin", f"{str(plugin).replace(',', ',,')},{ring.arguments}"),
            *("-chardev", f"socket,id=subpage-qmp,fd={theirs.fileno()}"),
            *("-mon", "chardev=subpage-qmp,mode=control"),
            "-S",
            "-no-reboot",
        ]
        passed = [*ring.fds, theirs.fileno()]
        if line is not None:
            added += ["-chardev", f"socket,id=subpage-line,fd={line.fileno()}", "-serial", "chardev:subpage-line"]
            passed.append(line.fileno())
        try:
            self._process = subprocess.Popen([program.path, *command[1:], *added], pass_fds=passed)
        except OSError as error:
            ours.close()
            raise CaptureError(f"{program.path}: cannot be run: {error.strerror or error}") from None
        finally:
            theirs.close()
        self._qmp = Qmp(ours)

    def begin(self) -> Guest:
        """Wait until QEMU has made the machine, and look at it. Raises CaptureError for one that cannot be recorded."""
        try:
            self._qmp.begin()
            guest = self._guest()
        except QmpClosed:
            status = self._process.wait(_QUIT_SECONDS)
            raise CaptureError(f"QEMU ended with status {status} before the guest ran; it said why") from None
        if self._qmp.execute("query-kvm")["enabled"]:
            raise CaptureError("QEMU uses KVM, where no plugin sees the guest's stores: use -accel tcg")
        if guest.interface == 0:
            raise CaptureError("QEMU did not load the plugin: it said why")
        if guest.interface == 1 and guest.ram > MOST_RAM_OF_INTERFACE_1:
            rule = "this QEMU is older than 9.0, and tells plugins wrong addresses above 4 GiB: at most -m 3G"
            raise CaptureError(f"the guest has {guest.ram / (1 << 30):g} GiB of RAM: {rule}")
        if guest.interface == 1 and guest.blocks > 1:
            rule = "this QEMU is older than 9.0, and tells plugins right addresses in the first alone: give it one"
            raise CaptureError(f"the guest's RAM is of {guest.blocks} memory backends (-numa): {rule}")
        return guest

    def _guest(self) -> Guest:
        sizes = self._qmp.execute("query-memory-size-summary")
        vcpus = self._qmp.execute("query-cpus-fast")
        backends = Backends(self._qmp)
        ram = ram_ranges(self._qmp.monitor("info mtree -f"), backends.names)
        ranges = tuple((each.first, each.size) for each in ram)
        backing = tuple(backends.behind(each) for each in ram)
        return Guest(
            int(sizes["base-memory"]),
            ranges,
            len(vcpus),
            self._ring.interface,
            backing,
            len({each.block for each in ram}),
        )

    def go(self) -> None:
        """Let the guest run, unless the command line says that it is to wait (-S). Raises CaptureError."""
        if not self._stays:
            self._qmp.execute("cont")

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest RAM as it is now. Raises CaptureError."""
        said = self._qmp.monitor(f"xp /{size}xb {gpa:#x}")
        found = re.findall(r"0x([0-9a-f]{2})\b", "\n".join(line.partition(":")[2] for line in said.splitlines()))
        if len(found) != size:
            raise CaptureError(f"QEMU does not show {size} bytes at {gpa:#x}: {said.strip()}")
        return bytes.fromhex("".join(found))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """What QEMU ended with; negative: the number of the signal."""
        return self._process.poll()

    @property
    def guest_runs(self) -> bool:
        """Whether QEMU runs, and the guest has not switched itself off in it (``-no-shutdown``)."""
        self.word()
        return not self._off and self.running

    def word(self) -> str | None:
        """What ended the guest, as far as QEMU has said so."""
        for event in self._qmp.events():
            self._off = self._off or event["event"] == "SHUTDOWN"
            self._word = _word_of(event) or self._word
            if event["event"] == "STOP" and self._status() in ("finish-migrate", "postmigrate"):
                self._off, self._word = True, "the guest has migrated: a recording ends there"
        return self._word

    def _status(self) -> str | None:
        """What QEMU says that the guest does."""
        try:
            return str(self._qmp.execute("query-status")["status"])
        except QmpClosed:
            return None

    def terminate(self) -> None:
        """Ask QEMU to end, the guest with it."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def quit(self) -> None:
        """End QEMU; by force if it must be."""
        if not self.running:
            return
        self._process.terminate()
        try:
            self._process.wait(_QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ring.close()
        self.quit()
        self._socket.close()


def _word_of(event: dict[str, Any]) -> str | None:
    name, data = event["event"], event.get("data", {})
    if name == "SHUTDOWN":
        reason = data.get("reason", "")
        if reason == "guest-reset":
            return "the guest reset: a recording ends there (QEMU runs with -no-reboot)"
        if reason == "guest-shutdown":
            return "the guest shut down"
        if reason == "guest-panic":
            return "the guest panicked"
    if name == "RESET" and data.get("guest"):
        return "the guest reset"
    return None
