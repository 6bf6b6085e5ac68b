"""Opaque cursors and the ``limit`` and ``next`` of every list.

A position is something that the last item of the page shows itself, its time or its place in its machine, so that a
cursor says nothing about what others do, and outlives a restart.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from urllib.parse import urlencode

from service.problems import InvalidDocument

_LAYOUT = struct.Struct("<Q4s")


def _check(kind: str, position: int) -> bytes:
    return hashlib.blake2b(f"{kind}:{position}".encode(), digest_size=4).digest()


def encode(kind: str, position: int) -> str:
    """An opaque text that stands for ``position`` in the list called ``kind``."""
    return base64.urlsafe_b64encode(_LAYOUT.pack(position, _check(kind, position))).decode().rstrip("=")


def decode(kind: str, cursor: str) -> int:
    """The position that ``encode(kind, …)`` was given. Raises InvalidDocument for anything else."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        position, check = _LAYOUT.unpack(raw)
    except (ValueError, binascii.Error, struct.error):
        position, check = 0, b""
    if check != _check(kind, position):
        raise InvalidDocument("must be the cursor of an earlier page of this list", field="cursor", value=cursor)
    return int(position)


def page_limit(limit: int | None, default: int, largest: int) -> int:
    """The number of items in a page: ``limit``, checked, or the default."""
    if limit is None:
        return default
    if not 1 <= limit <= largest:
        raise InvalidDocument(f"must be between 1 and {largest}", field="limit", value=limit)
    return limit


def next_url(path: str, kind: str, position: int, limit: int | None) -> str:
    """URL of the page that starts at ``position``; keeps the client's own ``limit``."""
    query: dict[str, str | int] = {"cursor": encode(kind, position)}
    if limit is not None:
        query["limit"] = limit
    return f"{path}?{urlencode(query)}"
