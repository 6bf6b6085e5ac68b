"""The first bytes of a connection, in both directions: who the guest is, and whether the tool may have it.

The hypervisor speaks first. It sends the longest form that any library knows, 104 bytes: those that know 96 read past
the rest.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from uuid import UUID

from service.kvmi.wire import Broken

# struct_size, uuid, padding, start of the guest in seconds since 1970, name with its NUL, end of guest memory.
_HELLO = struct.Struct("<I16sIq64sQ")
# struct_size, SHA-1 of the cookie or zeros.
_ANSWER = struct.Struct("<I20s")
_LONGEST_NAME = 63
# More than this and it is no answer to a handshake.
_LONGEST_ANSWER = 4096


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom the tool sees: ``started`` in seconds since 1970, ``cookie`` what it has to know, None for any tool."""

    uuid: UUID
    name: str
    started: int
    cookie: bytes | None = None


def short_name(name: str) -> bytes:
    """The name as a tool gets it: UTF-8 of 63 bytes at most, cut between characters, without NUL."""
    return name.replace("\0", "").encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore").encode()


def hello(identity: Identity, max_gpa: int) -> bytes:
    """What the hypervisor sends. ``max_gpa`` is the first address behind all memory."""
    return _HELLO.pack(
        _HELLO.size, identity.uuid.bytes, 0, identity.started, short_name(identity.name), max_gpa & (1 << 64) - 1
    )


def cookie_hash(cookie: str) -> bytes:
    """What a tool shows of its cookie. SHA-1 is the protocol's; the rights of the socket are what protects a guest."""
    return hashlib.sha1(cookie.encode(), usedforsecurity=False).digest()


def take_answer(buffer: bytearray, identity: Identity) -> bool:
    """Take the tool's answer off the front of ``buffer``; False while it has not arrived.

    Raises Broken for one that is too short, and for a cookie that is not the right one.
    """
    if len(buffer) < 4:
        return False
    size = int.from_bytes(buffer[:4], "little")
    if not _ANSWER.size <= size <= _LONGEST_ANSWER:
        raise Broken(f"the answer to the handshake says it has {size} bytes; it has {_ANSWER.size} or a few more")
    if len(buffer) < size:
        return False
    _, shown = _ANSWER.unpack_from(buffer)
    del buffer[:size]
    if identity.cookie is not None and not hmac.compare_digest(shown, identity.cookie):
        raise Broken("the tool's cookie is not that of the attachment")
    return True
