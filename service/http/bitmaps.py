"""Many 32-bit words at once, between JSON and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.http.wire_types import integer
from service.problems import InvalidDocument

WORD32_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": "^(0x[0-9a-fA-F]{1,8}|[0-9]{1,10})$"},
        {"type": "integer", "minimum": 0, "maximum": 0xFFFFFFFF},
    ]
}


def word32(value: Any, field: str) -> int:
    """One bitmap. Raises InvalidDocument for what is no number or wider than 32 bits."""
    number = integer(value) if type(value) is str else value
    if type(number) is not int:
        raise InvalidDocument("must be an integer, or a string of 0x and hexadecimal digits", field=field, value=value)
    if not 0 <= number <= 0xFFFFFFFF:
        raise InvalidDocument("must fit in 32 bits, one for each sub-page", field=field, value=value)
    return number


def words32(values: Sequence[Any], field: str) -> npt.NDArray[np.uint32]:
    """One bitmap for each of ``values``; an error names the position."""
    words = np.empty(len(values), dtype=np.uint32)
    position = 0
    try:
        for position, value in enumerate(values):
            words[position] = word32(value, field)
    except InvalidDocument as fault:
        fault.field = f"{field}[{position}]"
        raise
    return words


def window_json(gfn: int, words: npt.NDArray[np.uint32]) -> bytes:
    """``{"gfn", "npages", "access": [...]}``, written by hand: a bitmap is read far more often than anything else."""
    listed = '","'.join(map(hex, words.tolist()))
    return f'{{"gfn":"{gfn:#x}","npages":{len(words)},"access":["{listed}"]}}'.encode()
