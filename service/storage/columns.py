"""Named numpy columns as one blob: what exit records and their lookup tables are stored as, and backups too.

Layout: ``u32`` length of a JSON list ``[[name, dtype, shape, raw bytes, stored bytes], …]``, the list, then each column
in that order, little-endian and zstd-compressed. Values of ``dtype`` are as numpy writes them (``<u8``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# Level 1 of zstd packs a gigabyte of exit records in a few seconds; higher levels gain a few per cent.
_CODEC = pa.Codec("zstd", compression_level=1)


def compress(data: bytes) -> bytes:
    return bytes(_CODEC.compress(data, asbytes=True))


def decompress(data: bytes, size: int) -> bytes:
    return bytes(_CODEC.decompress(data, decompressed_size=size, asbytes=True)) if size else b""


def pack(columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Raises TypeError for columns of Python objects, which have no bytes."""
    listed = []
    stored = []
    for name, column in columns.items():
        if column.dtype.hasobject:
            raise TypeError(f"column {name} holds objects")
        plain = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
        raw = plain.tobytes()
        packed = compress(raw) if raw else b""
        listed.append([name, plain.dtype.str, list(plain.shape), len(raw), len(packed)])
        stored.append(packed)
    header = json.dumps(listed).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *stored])


def unpack(data: bytes) -> dict[str, NDArray[Any]]:
    """What ``pack`` was given."""
    end = 4 + int.from_bytes(data[:4], "little")
    columns: dict[str, NDArray[Any]] = {}
    for name, dtype, shape, size, stored in json.loads(data[4:end]):
        raw = decompress(data[end : end + stored], size)
        columns[name] = np.frombuffer(bytearray(raw), dtype=np.dtype(dtype)).reshape(shape)
        end += stored
    return columns


def sizes(data: bytes) -> list[int]:
    """Bytes of each column in the order of their places, as the header claims them. Raises ValueError where the claims
    do not fit each other or the data."""
    end = 4 + int.from_bytes(data[:4], "little")
    claimed: list[int] = []
    left = len(data) - end
    for name, dtype, shape, size, stored in json.loads(data[4:end]):
        kind = np.dtype(dtype)
        if kind.kind not in "iufbS" or not all(
            type(number) is int and number >= 0 for number in (*shape, size, stored)
        ):
            raise ValueError(f"column {name!s:.40} is none of numbers")
        if math.prod(shape) * kind.itemsize != size:
            raise ValueError(f"column {name!s:.40} of shape {shape} has not {size} bytes")
        left -= stored
        claimed.append(size)
    if left:
        raise ValueError("they are not as long as they say")
    return claimed
