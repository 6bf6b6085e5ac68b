"""Volatility 3's intermediate symbol files (ISF): JSON, as it is or packed by xz, gzip or bzip2.

https://volatility3.readthedocs.io, "Symbol Tables", and the schema files beside its sources: ``symbols`` maps names to
``address``, ``type`` and ``constant_data``; sizes are those of the types, which the other members describe.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import lzma
import zlib
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Raw, Struct

from engine.errors import InvalidValue
from engine.symbols.table import SymbolTable, Take, check_count, check_name, table_of

# What unpacks each, by how it begins.
_XZ, _GZIP, _BZIP2 = b"\xfd7zXZ\0", b"\x1f\x8b", b"BZh"
PACKED = (_XZ, _GZIP, _BZIP2)
_PIECE = 1 << 20
# Of the dictionary of xz: those of its highest level need 64 MiB.
_XZ_MEMORY = 128 << 20
# What an object of the file takes of memory, with its name.
_OBJECT = 256
_LARGEST = 1 << 62
# Where the size of a type stands, by its kind.
_KNOWN_IN = {
    "base": "base_types",
    "pointer": "base_types",
    "struct": "user_types",
    "union": "user_types",
    "class": "user_types",
    "enum": "enums",
}


T = TypeVar("T")


class _Type(Struct):
    kind: str
    name: str = ""
    count: int = 0
    subtype: _Type | None = None


class _Sized(Struct, gc=False):
    size: int


class _Symbol(Struct, gc=False):
    address: int
    type: Raw = Raw(b"null")
    constant_data: Raw = Raw(b"null")


class _File(Struct):
    """What is looked at of a file; everything else is passed over."""

    symbols: Raw
    base_types: Raw = Raw(b"{}")
    user_types: Raw = Raw(b"{}")
    enums: Raw = Raw(b"{}")


class _Contents(NamedTuple):
    symbols: dict[str, _Symbol]
    base_types: dict[str, _Sized]
    user_types: dict[str, _Sized]
    enums: dict[str, _Sized]


def read(data: bytes, most: int, take: Take) -> tuple[SymbolTable, bytes | None]:
    """(table, text of ``linux_banner`` if the file has it). ``take`` is asked for what unpacking needs.

    Raises InvalidValue, also when it unpacks to more than ``most`` bytes.
    """
    file = _decoded(unpacked(data, most, take), take)
    names, addresses, sizes = [], [], []
    for name, symbol in file.symbols.items():
        encoded = name.encode(errors="replace")
        where = f"symbols.{name[:100]}"
        check_name(encoded, where)
        if not 0 <= symbol.address < 1 << 64:
            raise InvalidValue(f"{where}.address: expected an integer of 64 bits", field="body", value=symbol.address)
        names.append(encoded)
        addresses.append(symbol.address)
        sizes.append(_size(_part(symbol.type, _Type | None), file))  # type: ignore[arg-type]
    return table_of(names, addresses, sizes), _banner(file)


def unpacked(data: bytes, most: int, take: Take) -> bytes:
    """The JSON in a file that may be packed. Raises InvalidValue, and what ``take`` raises."""
    if not data.startswith(PACKED):
        if len(data) > most:
            raise InvalidValue(f"must have at most {most} bytes", field="body", value=len(data))
        return data
    unpack = _unpacker(data)
    parts, size = [], 0
    try:
        while not unpack.eof:
            part = unpack(_PIECE)
            if not part and not unpack.eof:
                rule = f"ends at byte {len(data)}, inside what is packed: is the file cut?"
                raise InvalidValue(rule, field="body", value=len(data))
            size += len(part)
            if size > most:
                rule = f"must unpack to at most {most} bytes"
                raise InvalidValue(rule, field="body", value=size)
            take(len(part))
            parts.append(part)
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise InvalidValue(f"cannot be unpacked: {error}", field="body", value=size) from None
    take(size)
    return b"".join(parts)


class _Unpacker:
    """The next bytes of what is packed, a bounded number at a time."""

    def __init__(self, unpack: Any, left: str, data: bytes) -> None:
        self._unpack = unpack
        self._left = left
        self._data = data

    def __call__(self, most: int) -> bytes:
        made: bytes = self._unpack.decompress(self._data, most)
        # zlib gives back what it has not looked at; the others keep it.
        self._data = getattr(self._unpack, self._left) if self._left else b""
        return made

    @property
    def eof(self) -> bool:
        return bool(self._unpack.eof)


def _unpacker(data: bytes) -> _Unpacker:
    if data.startswith(_XZ):
        return _Unpacker(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY), "", data)
    if data.startswith(_GZIP):
        return _Unpacker(zlib.decompressobj(wbits=31), "unconsumed_tail", data)
    return _Unpacker(bz2.BZ2Decompressor(), "", data)


def _decoded(text: bytes, take: Take) -> _Contents:
    """The parts that are looked at. Each call of the decoder keeps other threads waiting: of symbols and types it makes
    no more than it must, and their own types are decoded one at a time."""
    file = _part(text, _File)
    types = (file.base_types, file.user_types, file.enums)
    known = _entries(file.symbols, b"address")
    check_count(known)
    take(_OBJECT * (known + sum(_entries(part, b"size") for part in types)))
    symbols = _part(file.symbols, dict[str, _Symbol], "symbols: ")
    return _Contents(symbols, *(_part(part, dict[str, _Sized], "types: ") for part in types))


def _part(text: bytes | Raw, kind: type[T], where: str = "") -> T:
    """A part of the file; ``where`` says which. Raises InvalidValue."""
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError:
        raise InvalidValue("is nested too deeply", field="body") from None
    except msgspec.ValidationError as error:
        raise InvalidValue(f"{where}is not as in a Volatility 3 symbol file: {error}", field="body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidValue(f"is not JSON, or cut: {error}", field="body", value=memoryview(text).nbytes) from None


def _entries(part: Raw, member: bytes) -> int:
    """How many entries can be made of a part in which each must have a member, however its name is written."""
    text = bytes(part)
    return text.count(b'"%s"' % member) + text.count(b"\\")


def _size(kind: _Type | None, file: _Contents) -> int:
    """Bytes of a type, 0 where the file does not say."""
    times = 1
    while kind is not None and kind.kind == "array":
        times = min(times * max(kind.count, 0), _LARGEST)
        kind = kind.subtype
    if kind is None or kind.kind not in _KNOWN_IN:
        return 0
    known: dict[str, _Sized] = getattr(file, _KNOWN_IN[kind.kind])
    found = known.get("pointer" if kind.kind == "pointer" else kind.name)
    size = times * found.size if found is not None else 0
    return size if 0 <= size < _LARGEST else 0


def _banner(file: _Contents) -> bytes | None:
    symbol = file.symbols.get("linux_banner")
    data = None if symbol is None else _part(symbol.constant_data, str | None)  # type: ignore[arg-type]
    if not data:
        return None
    try:
        text = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None
    return text.rstrip(b"\0") or None
