"""Local sockets that the service may connect to: which the operator allows, and a connection that cannot be led astray.

A path is a capability: whoever names one makes the service connect to it. So it has to be below a directory that is
allowed, whatever symbolic links say, and between the look at it and the connection nothing can be put in its place.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

UNIX, VSOCK = "unix", "vsock"
_NUMBER = r"[0-9]{1,10}"
_VSOCK = re.compile(rf"({_NUMBER})(?::({_NUMBER}))?")
_TENANT = re.compile(r"(?:([^=/:]+)=)?(.*)", re.DOTALL)
_MOST = (1 << 32) - 1
# pid, uid, gid of the process at the other end.
_PEER = struct.Struct("<3i")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotAllowed(Exception):
    """An address that the service does not connect to; the text is the rule."""


def _numbers(text: str) -> tuple[int, int | None] | None:
    found = _VSOCK.fullmatch(text)
    if found is None:
        return None
    cid, port = int(found[1]), None if found[2] is None else int(found[2])
    return (cid, port) if max(cid, port or 0) <= _MOST else None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tool listens: a path, or a context and a port."""

    path: Path | None = None
    cid: int = 0
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that ``unix:PATH`` or ``vsock:CID:PORT`` is. Raises NotAllowed."""
        kind, _, rest = text.partition(":")
        if kind == UNIX and rest.startswith("/") and "\0" not in rest:
            return cls(Path(rest))
        numbers = _numbers(rest) if kind == VSOCK else None
        if numbers is None or numbers[1] is None:
            raise NotAllowed("must be unix: and an absolute path, or vsock:CID:PORT")
        return cls(None, numbers[0], numbers[1])


@dataclass(frozen=True, slots=True)
class Allowed:
    """One place of the operator's: a directory, or a context and perhaps one port of it; for one tenant, or all."""

    directory: Path | None
    cid: int = 0
    port: int | None = None
    tenant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """The place that a setting means. Raises ValueError."""
        found = _TENANT.fullmatch(text)
        assert found is not None
        kind, _, rest = found[2].partition(":")
        if kind == UNIX and rest.startswith("/") and "\0" not in rest:
            return cls(Path(rest), tenant=found[1])
        numbers = _numbers(rest) if kind == VSOCK else None
        if numbers is None:
            raise ValueError(f"{text!r}: must be unix:/DIRECTORY, vsock:CID or vsock:CID:PORT, perhaps after TENANT=")
        return cls(None, *numbers, tenant=found[1])

    def holds(self, address: Address) -> bool:
        """Whether an address is there, as symbolic links stand now."""
        if address.path is None:
            return self.directory is None and self.cid == address.cid and self.port in (None, address.port)
        if self.directory is None:
            return False
        inside = Path(os.path.realpath(address.path.parent))
        return inside.is_relative_to(os.path.realpath(self.directory))


def check(address: Address, places: tuple[str, ...], tenant: str) -> None:
    """Raise NotAllowed unless the operator lets machines of ``tenant`` connect there."""
    known = [place for place in map(Allowed.parse, places) if place.tenant in (None, tenant)]
    if not known:
        raise NotAllowed("the operator allows no sockets of tools (SUBPAGE_KVMI_SOCKETS)")
    if not any(place.holds(address) for place in known):
        raise NotAllowed("must be where the operator lets tools listen (SUBPAGE_KVMI_SOCKETS)")


def connected(address: Address, places: tuple[str, ...], tenant: str, timeout: float) -> socket.socket:
    """A connection to a tool, made in at most ``timeout`` seconds. Raises NotAllowed, OSError."""
    check(address, places, tenant)
    if address.path is None:
        made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        return _connect(made, (address.cid, address.port), timeout)
    return _unix(address.path, places, tenant, timeout)


def _connect(made: socket.socket, where: object, timeout: float) -> socket.socket:
    try:
        made.settimeout(timeout)
        made.connect(where)  # type: ignore[arg-type]
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def _unix(path: Path, places: tuple[str, ...], tenant: str, timeout: float) -> socket.socket:
    """Both the directory and the socket are held open, so that what was looked at is what is connected to."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Where it really is, now that nobody can move it.
        check(Address(Path(f"/proc/self/fd/{directory}").readlink() / path.name), places, tenant)
        held = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not stat.S_ISSOCK(os.fstat(held).st_mode):
                raise NotAllowed("must be a socket, and no symbolic link")
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _connect(made, f"/proc/self/fd/{held}", timeout)
        finally:
            os.close(held)
        try:
            _check_peer(made, os.fstat(directory))
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(directory)


def _check_peer(made: socket.socket, directory: os.stat_result) -> None:
    """Where others may put a socket, it has to be of the service's user, the directory's owner or root."""
    if not directory.st_mode & _OTHERS_WRITE:
        return
    _, uid, _ = _PEER.unpack(made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid not in (0, os.geteuid(), directory.st_uid):
        raise NotAllowed(
            f"the tool runs as user {uid}: others than the service's user may write to the directory of its socket"
        )
