"""What is on the wire: the header of a message, numbers of errors, actions and rights, and messages out of a stream.

Everything is little-endian. Both dialects that are spoken call themselves version 1: ``v7`` is that of the branch
kvmi-v7 of KVM-VMI and of libkvmi 1.0 and later, ``v6`` that of the posting of August 2019.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

V6, V7 = "v6", "v7"

# id, bytes that follow, sequence number of the exchange.
HEADER = struct.Struct("<HHI")
# What may follow a header: 8 KiB with it, as in the trees that tools are built for.
MAX_PAYLOAD = 8192 - HEADER.size
# The start of a reply: 0 or minus an error, and padding.
ERROR_CODE = struct.Struct("<iI")
_REPLY = struct.Struct("<HHIiI")  # both
# The start of a command to a vCPU, and of a reply to an event: index of the vCPU, and padding.
VCPU_HEADER = struct.Struct("<HHI")

# Errors, as the protocol numbers them.
EPERM, ENOENT, EAGAIN, ENOMEM, EBUSY, EINVAL, EOPNOTSUPP, ENOSYS = 1, 2, 11, 12, 16, 22, 95, 1000

# What a tool answers to an event.
CONTINUE, RETRY, CRASH = 0, 1, 2

# Rights of a page.
READ, WRITE, EXECUTE = 1, 2, 4
ALL_RIGHTS = READ | WRITE | EXECUTE
FULL_BITMAP = 0xFFFF_FFFF
PAGE_SIZE = 4096
# An address that is not known, or leads nowhere.
NO_ADDRESS = (1 << 64) - 1


class Refused(Exception):
    """A command fails: its reply is ``errno`` and nothing else."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Broken(Exception):
    """The hypervisor closes the connection instead of answering; the text says why."""


class Message(NamedTuple):
    """One message. ``payload`` is what follows the header."""

    id: int
    seq: int
    payload: bytes


def message(id: int, seq: int, payload: bytes) -> bytes:
    """A message, to be sent in one piece."""
    return HEADER.pack(id, len(payload), seq) + payload


def reply(id: int, seq: int, errno: int = 0, data: bytes = b"") -> bytes:
    """The reply to a command: exactly 8 bytes after the header where it failed."""
    if errno:
        data = b""
    return _REPLY.pack(id, ERROR_CODE.size + len(data), seq, -errno, 0) + data


class Framer:
    """Messages out of a stream that is torn anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        self._buffer += data

    def next(self) -> Message | None:
        """The next whole message. Raises Broken for one that claims more than there may be."""
        if len(self._buffer) < HEADER.size:
            return None
        id, size, seq = HEADER.unpack_from(self._buffer)
        if size > MAX_PAYLOAD:
            raise Broken(f"a message of {size} bytes after its header: there are {MAX_PAYLOAD} at most")
        end = HEADER.size + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[HEADER.size : end])
        # The buffer of one reading is some kilobytes, so that moving its rest is nothing.
        del self._buffer[:end]
        return Message(id, seq, payload)
