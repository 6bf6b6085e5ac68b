"""Numbers and bytes as the contract has them."""

from __future__ import annotations

import re
from typing import Any

from subpage.errors import BadInput

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)\s*(?:([kmgt])(?:i?b)?)?")


def size_of(given: int | str) -> int:
    """``4096``, ``"0x1000"``, ``"512MiB"``, ``"1G"`` in bytes. Raises BadInput. ::

    >>> size_of("1GiB"), size_of("0x1000")
    (1073741824, 4096)
    """
    found = _SIZE.fullmatch(str(given).strip().lower())
    if found is None:
        raise BadInput(f"{given!r}: must be a number of bytes, or a size such as 1GiB")
    return int(found[1], 0) * _UNITS[found[2] or ""]


def address(given: int | str | None) -> str | None:
    """An address or a size as ``0x…``. Raises BadInput."""
    if given is None:
        return None
    if isinstance(given, int) and given < 0:
        raise BadInput(f"{given}: must not be negative")
    return hex(size_of(given) if isinstance(given, str) else int(given))


def members_of(*, data: bytes | None = None, **members: Any) -> dict[str, Any]:
    """A document of the members that are there, with ``data`` in hex."""
    members["data"] = None if data is None else bytes(data).hex()
    return {name: value for name, value in members.items() if value is not None}
