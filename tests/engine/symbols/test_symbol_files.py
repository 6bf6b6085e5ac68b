"""What each reader takes from its files, and where it says that a file is wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidValue
from engine.symbols import formats
from engine.symbols.table import Symbol, each
from tests.support import symbol_files
from tests.support.symbol_files import KERNEL

PLAIN = [row for row in KERNEL if row[2] != "twice"]  # names of an ISF are those of an object: each once


PAIR = {"kind": "array", "count": 2, "subtype": {"kind": "pointer"}}
DEEP = b'{"symbols": {"a": {"address": 1, "type": ' + b'{"kind":"array","subtype":' * 50000


def by_name(data: bytes, format: str | None = None) -> dict[str, Symbol]:
    return {item.name: item for item in each(formats.read(data, format).table)}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\n"])
def test_kallsyms_with_any_line_end(end: str) -> None:
    file = formats.read(symbol_files.kallsyms(end=end))
    assert file.format == "kallsyms"
    found = by_name(symbol_files.kallsyms(end=end))
    assert found["modprobe_path"] == Symbol("modprobe_path", 0xFFFFFFFF82A5C6A0, 256, assumed=True)
    assert found["e1000_probe [e1000]"].address == 0xFFFFFFFFC0201000
    assert len(file.table) == len(KERNEL) + 1


def test_the_last_symbol_and_one_far_from_the_next_have_no_size() -> None:
    found = by_name(symbol_files.kallsyms())
    assert (found["cpu_info"].size, found["cpu_info"].assumed) == (0, False)
    assert (found["e1000_probe [e1000]"].size, found["e1000_probe [e1000]"].assumed) == (0, False)


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress, bz2.compress])
def test_isf_has_sizes_of_types(pack: Any) -> None:
    found = by_name(pack(symbol_files.isf(PLAIN)))
    assert found["sys_call_table"] == Symbol("sys_call_table", 0xFFFFFFFF82000360, 3616, assumed=False)
    assert found["_text"] == Symbol("_text", 0xFFFFFFFF81000000, 0x40, assumed=True)


def test_isf_sizes_of_every_kind_of_type() -> None:
    kinds = {
        "pointer": ({"kind": "pointer", "subtype": {"kind": "base", "name": "void"}}, 8),
        "struct": ({"kind": "struct", "name": "cred"}, 176),
        "enum": ({"kind": "enum", "name": "state"}, 4),
        "pointers": ({"kind": "array", "count": 3, "subtype": {"kind": "pointer"}}, 24),
        "matrix": ({"kind": "array", "count": 3, "subtype": PAIR}, 48),
        "function": ({"kind": "function"}, 0x1000),
        "unknown": ({"kind": "struct", "name": "missing"}, 0x1000),
    }  # fmt: skip
    symbols = {name: {"address": 0x1000 * at, "type": kind} for at, (name, (kind, _)) in enumerate(kinds.items())}
    found = by_name(symbol_files.isf(PLAIN, symbols={**symbols, "end": {"address": 0x7000}}))
    assert {name: found[name].size for name in kinds} == {name: size for name, (_, size) in kinds.items()}
    assert {name for name in kinds if found[name].assumed} == {"function", "unknown"}


@pytest.mark.parametrize("table", [2, 11])
def test_elf_has_sizes_of_the_compiler(table: int) -> None:
    file = formats.read(symbol_files.elf(table=table))
    found = {item.name: item for item in each(file.table)}
    assert file.format == "elf"
    assert found["modprobe_path"] == Symbol("modprobe_path", 0xFFFFFFFF82A5C6A0, 256, assumed=False)
    assert found["_text"].assumed


def test_the_banner_of_an_isf_is_kept() -> None:
    assert formats.read(symbol_files.isf(PLAIN, symbol_files.BANNER)).banner == symbol_files.BANNER.rstrip(b"\0")


GOOD = symbol_files.kallsyms()
REFUSED: list[tuple[str, bytes, str | None, str]] = [
    ("empty", b"", None, "is empty"),
    ("cut line", GOOD[:-40] + b"\nffffffff82a5", "kallsyms", "line 14: expected an address"),
    ("foreign line", GOOD + b"# end of symbols\n" + GOOD, None, "line 15: expected an address"),
    ("number past 64 bits", GOOD + b"1ffffffff82a5c6a0 D x\n", None, "line 15: an address has 64 bits"),
    ("NUL bytes", GOOD + bytes(64) + b"\n", None, "line 15: expected"),
    ("NUL in a name", GOOD + b"ffffffff82a5c6a0 D a\0b\n", None, "line 15: expected"),
    ("long line", GOOD + b"a" * 20000, None, "line 15: a line has at most"),
    ("long name", GOOD + b"ffffffff82a5c6a0 D " + b"a" * 5000 + b"\n", None, "line 15: a name has 1 to"),
    ("not UTF-8", GOOD + b"ffffffff82a5c6a0 D a\xffb\n", None, "not UTF-8"),
    ("placeholder", b"ffffffffffffffff B The real System.map is in the linux-image-6-dbg package\n", "system-map",
     "line 1: is a placeholder"),
    ("hidden", b"0000000000000000 T _text\n0000000000000000 T x\n", None, "kptr_restrict"),
    ("no symbols", b"\n\n\n", "kallsyms", "has no symbol"),
    ("prose", b"Dear all,\nthese are the symbols\n", None, "is no file of symbols"),
    ("boot image", bytes(0x202) + b"HdrS" + bytes(64), None, "boot image"),
    ("zstd", b"\x28\xb5\x2f\xfd" + bytes(64), None, "zstd"),
    ("unknown format", GOOD, "pdb", "must be one of kallsyms"),
    ("isf without symbols", b'{"metadata": {}}', None, "required field `symbols`"),
    ("isf, no address", b'{"symbols": {"a": {}}}', None, "symbols: is not as in a Volatility 3 symbol file"),
    ("isf, too many", b'{"symbols": {' + b'"address",' * ((1 << 20) + 1) + b"}}", None, ""),
    ("isf, empty", b'{"symbols": {}}', None, "has no symbol"),
    ("isf, cut", symbol_files.isf(PLAIN)[:-30], None, "or cut"),
    ("isf, address of text", b'{"symbols": {"a": {"address": "0x1"}}}', None, "Expected `int`, got `str`"),
    ("isf, negative address", b'{"symbols": {"a": {"address": -1}}}', None, "symbols.a.address: expected an integer"),
    ("isf, address past 64 bits", b'{"symbols": {"a": {"address": 18446744073709551616}}}', None, "64 bits"),
    ("isf, name with a space", b'{"symbols": {"a b": {"address": 1}}}', None, "symbols.a b: a name has"),
    ("isf, lone surrogate", b'{"symbols": {"a\\ud800": {"address": 1}}}', None, ""),
    ("isf, deep", DEEP, None, ""),
    ("isf, deep elsewhere", b'{"metadata": ' + b"[" * 100000, None, ""),
    ("isf, cut xz", lzma.compress(symbol_files.isf(PLAIN))[:-40], None, ""),
    ("isf, broken gzip", b"\x1f\x8b" + b"x" * 100, None, "cannot be unpacked"),
    ("isf, not packed JSON", lzma.compress(b"words"), None, "is not JSON"),
    ("elf of ARM", symbol_files.elf(machine=183), None, "e_machine: is an image of AArch64; expected x86-64 (62)"),
    ("elf of 32 bits", symbol_files.elf(bits=1), None, "64-bit little-endian"),
    ("elf object", symbol_files.elf(kind=1), None, "e_type: is an object file"),
    ("elf core", symbol_files.elf(kind=4), None, "e_type: is a core dump"),
    ("elf, stripped", symbol_files.elf(table=1), None, "stripped"),
    ("elf, cut", symbol_files.elf()[:-10], None, "section headers would end at byte"),
    ("elf, cut header", symbol_files.elf()[:20], None, "inside its ELF header"),
    ("not elf", GOOD, "elf", "is no ELF image"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "format", "told"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_bad_files_are_refused_with_the_place(data: bytes, format: str | None, told: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        formats.read(data, format)
    assert told in caught.value.rule


def test_what_unpacks_to_much_is_refused_before_it_is_there() -> None:
    taken: list[int] = []
    with pytest.raises(InvalidValue, match="at most 4194304 bytes"):
        formats.read(lzma.compress(bytes(64 << 20)), most=4 << 20, take=taken.append)
    assert sum(taken) <= 4 << 20


def test_what_decoding_needs_is_asked_for_first() -> None:
    class TooMuch(Exception):
        pass

    def take(size: int) -> None:
        if size > 1 << 20:
            raise TooMuch

    many = b'{"symbols": {' + b",".join(b'"a%d":{"address":1}' % i for i in range(10000)) + b"}}"
    with pytest.raises(TooMuch):
        formats.read(many, take=take)
    types = b'{"symbols": {}, "user_types": {' + b",".join(b'"a%d":{"size":1}' % i for i in range(10000)) + b"}}"
    with pytest.raises(TooMuch):
        formats.read(types, take=take)


NAMES = st.from_regex(r"[A-Za-z_.$][A-Za-z0-9_.$]{0,20}", fullmatch=True)
ROWS = st.dictionaries(
    NAMES, st.tuples(st.integers(1, (1 << 64) - 1), st.integers(1, 1 << 20)), min_size=1, max_size=20
)


@settings(deadline=None)  # machines that are busy
@given(ROWS)
def test_every_form_of_the_same_symbols_reads_the_same(wanted: dict[str, tuple[int, int]]) -> None:
    rows = [(address, "D", name, size) for name, (address, size) in wanted.items()]
    expected = {name: address for name, (address, _) in wanted.items()}
    for data, format, sized in (
        (symbol_files.kallsyms(rows, more=()), "kallsyms", False),
        (symbol_files.kallsyms(rows, more=(), end="\r\n"), "system-map", False),
        (symbol_files.isf(rows), "isf", True),
        (symbol_files.elf(rows), "elf", True),
    ):
        found = by_name(data, format)
        assert {name: item.address for name, item in found.items()} == expected
        if sized:
            assert {name: item.size for name, item in found.items()} == {n: size for n, (_, size) in wanted.items()}
        distinct = sorted(set(expected.values()))
        for item in found.values():
            if item.assumed:
                assert item.size == distinct[distinct.index(item.address) + 1] - item.address


@settings(max_examples=50, deadline=None)  # machines that are busy
@given(st.binary(max_size=300), st.sampled_from([None, *formats.FORMATS]))
def test_no_bytes_but_a_refusal_or_a_table(data: bytes, format: str | None) -> None:
    for body in (data, symbol_files.elf()[:200] + data, json.dumps({"symbols": data.hex()}).encode() + data):
        try:
            formats.read(body, format)
        except InvalidValue:
            continue


@settings(deadline=None)  # machines that are busy
@given(st.data())
def test_a_cut_or_changed_elf_is_refused_or_read(data: st.DataObject) -> None:
    image = bytearray(symbol_files.elf())
    for at in data.draw(st.lists(st.integers(4, len(image) - 1), max_size=4)):
        image[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    for body in (bytes(image), bytes(image[:cut])):
        try:
            formats.read(body, "elf")
        except InvalidValue:
            continue
