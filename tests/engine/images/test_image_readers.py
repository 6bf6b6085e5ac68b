"""Readers of memory images: raw, ELF cores and LiME, whole and broken. Layouts: ELF specification; QEMU's
dump/dump.c and target/i386/arch_dump.c; LiME's src/lime.h."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidValue
from engine.images import base, open_image
from tests.support.images import elf_core, lime, note, qemu_note

PAGE = 4096
LONG = {"cr0": 0x80050033, "cr2": 0x7F00, "cr3": 0x1234000, "cr4": 0x6F0, "rip": 0xFFFFFFFF81000000, "rsp": 0x7000}


class Dribble:
    """A source that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int = 7) -> None:
        self._file = BytesIO(data)
        self._size = size

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(min(size, self._size))


def contents(data: bytes, format: str = "auto", gpa: int | None = None) -> dict[int, bytes]:
    """What an image has, by its ranges."""
    image = open_image(format, BytesIO(data), gpa)
    memory = {block.gpa: bytes(block.data) for block in image}
    return {
        begin: b"".join(memory[at] for at in sorted(memory) if begin <= at < begin + size)
        for begin, size in image.ranges.all()
    }


def test_raw_is_bytes_from_an_address_on() -> None:
    assert contents(b"abc", "raw", 0x1000) == {0x1000: b"abc"}
    assert contents(b"abc", "raw") == contents(b"abc") == {0: b"abc"}


def test_lime_ranges_end_with_their_last_byte() -> None:
    data = lime((0x1000, b"a" * 0x9EC00), (0x100000, b"b" * PAGE), (0x101000, b"c"))
    assert contents(data) == {0x1000: b"a" * 0x9EC00, 0x100000: b"b" * PAGE + b"c"}


@pytest.mark.parametrize("bits", [32, 64])
def test_elf_cores_have_ranges_and_registers(bits: int) -> None:
    notes = note(b"CORE", 1, bytes(336)) * 2 + qemu_note(LONG) + qemu_note({"cr0": 0x60000010})
    data = elf_core([(0, b"a" * PAGE), (0x100000, b"b" * 100)], notes, bits=bits)
    assert contents(data) == {0: b"a" * PAGE, 0x100000: b"b" * 100}
    image = open_image("elf", Dribble(data))
    assert sum(len(block.data) for block in image) == PAGE + 100
    first, second = image.vcpus
    assert (first.rip, first.rsp, first.cr0, first.cr2, first.cr3, first.cr4) == (
        0xFFFFFFFF81000000,
        0x7000,
        0x80050033,
        0x7F00,
        0x1234000,
        0x6F0,
    )
    assert (first.efer, second.efer, second.cr3) == (0xD00, 0, 0)


def test_efer_of_a_machine_of_32_bits_is_not_in_long_mode() -> None:
    (pae,) = _vcpus(elf_core([(0, b"x")], qemu_note(LONG), machine=3))
    (legacy,) = _vcpus(elf_core([(0, b"x")], qemu_note({**LONG, "cr4": 0x10}), machine=3))
    assert (pae.efer, legacy.efer) == (0x800, 0)


def _vcpus(data: bytes) -> tuple[base.VcpuRegisters, ...]:
    image = open_image("auto", BytesIO(data))
    list(image)
    return image.vcpus


def test_mappings_of_the_same_memory_are_one_range() -> None:
    """``dump-guest-memory -p``: several virtual addresses of the same bytes of the file."""
    memory = b"a" * PAGE + b"b" * PAGE
    loads = [(0, 0x1000, PAGE), (0, 0x1000, 2 * PAGE), (PAGE, 0x2000, PAGE)]
    assert contents(elf_core([(0, memory)], loads=loads)) == {0x1000: memory}


def test_what_no_segment_tells_of_is_passed_over() -> None:
    data = elf_core([(0, b"a" * PAGE + b"-" * 10 + b"b" * 3)], loads=[(PAGE + 10, 0x5000, 3), (0, 0, PAGE)])
    assert contents(data + b"section names") == {0: b"a" * PAGE, 0x5000: b"bbb"}


def test_blocks_are_bounded_and_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK", 2 * PAGE)
    data = bytes(range(256)) * 100
    blocks = []
    for block in open_image("raw", BytesIO(data), 0x1F01):
        assert len(block.data) <= 2 * PAGE
        assert (block.data.ctypes.data - block.gpa) % 8 == 0, "whole pages are words"
        blocks.append((block.gpa, block.offset, bytes(block.data)))
    assert [gpa - offset for gpa, offset, _ in blocks] == [0x1F01] * len(blocks)
    assert b"".join(part for _, _, part in blocks) == data


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 9000)), min_size=1, max_size=6),
    st.sampled_from(["lime", "elf"]),
    st.integers(1, 20000),
)
def test_what_is_written_is_read(parts: list[tuple[int, int]], format: str, piece: int) -> None:
    at, segments = 0, []
    for number, (gap, size) in enumerate(parts):
        segments.append((at + gap, bytes([number + 1]) * size))
        at += gap + size
    data = lime(*segments) if format == "lime" else elf_core(segments, qemu_note(LONG))
    image = open_image("auto", Dribble(data, piece))
    found = bytearray(at)
    for block in image:
        found[block.gpa : block.gpa + len(block.data)] = bytes(block.data)
    wanted = bytearray(at)
    for gpa, content in segments:
        wanted[gpa : gpa + len(content)] = content
    assert found == wanted
    assert image.format == format and image.ranges.all() == [(gpa, len(content)) for gpa, content in segments]


GOOD = elf_core([(0, b"a" * PAGE), (0x100000, b"b" * PAGE)], qemu_note(LONG))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "must not be empty"),
        (GOOD[:5], "ends at byte 5; the header of ELF should end at byte 16"),
        (GOOD[:100], "ends at byte 100; the program headers should end at byte"),
        (GOOD[:300], "ends at byte 300; the notes should end"),
        (
            GOOD[:-1],
            f"ends at byte {len(GOOD) - 1}; the segment of GPA 0x100000 to 0x100fff should end at byte {len(GOOD)}",
        ),
        (elf_core([(0, b"a")], machine=183), "x86 machine"),
        (elf_core([(0, b"a")], kind=2), "must be a core"),
        (elf_core([(0, b"a")], ident=b"\x7fELF\2\2\1" + bytes(9)), "little-endian"),
        (elf_core([(0, b"a")], ident=b"\x7fELF\3\1\1" + bytes(9)), "32 or 64 bits"),
        (elf_core([(0, b"a")], phnum=0), "must have memory"),
        (elf_core([(0, b"a")], phnum=0xFFFF), "without -p"),
        (elf_core([(0, b"a")], phoff=8), "behind its header"),
        (elf_core([(0, b"a")], phentsize=64), "program headers of 56 bytes"),
        (elf_core([]), "must have memory"),
        (elf_core([(0, b"a" * 8), (4, b"b" * 8)]), "ranges must not overlap"),
        (elf_core([(0, b"a" * 8)], loads=[(0, 0, 8), (4, 0x1000, 4)]), "is in two segments, for GPA 0x4 and 0x1000"),
        (elf_core([((1 << 52) - 1, b"ab")]), "below 2^52"),
        (elf_core([(0, b"a")], loads=[(0, 0, (1 << 64) - 1)]), "bytes that a file can have"),
        (elf_core([(0, b"a")], loads=[(-100, 0, 1)]), "behind the program headers"),
        (elf_core([(0, b"a")], qemu_note(LONG)[:-8]), "notes must not be longer"),
        (elf_core([(0, b"a")], qemu_note(LONG, version=2)), "QEMU's notes have version 1"),
        (elf_core([(0, b"a")], note(b"QEMU", 0, bytes(100))), "QEMU's notes have version 1"),
        (lime((0, b"a" * PAGE))[:-1], "ends at byte 4127; the range 0x0 to 0xfff should end at byte 4128"),
        (lime((0, b"a"))[:20], "ends at byte 20; a header of LiME should end at byte 32"),
        (lime((0, b"a")) + b"x" * 32, "magic 0x4c694d45 is due at byte 33"),
        (lime((0, b"a"), version=2), "must be LiME of version 1"),
        (lime((0x2000, b"")), "must not lie below its first"),
        (lime((0, b"a" * 9), (8, b"b")), "ranges must not overlap; that which byte 41 tells of"),
        (lime(((1 << 52) - 1, b"ab")), "below 2^52"),
        (b"KDUMP   \6\0\0\0", "kdump-compressed"),
        (b"PAGEDU64", "Windows crash dump"),
        (b"AVML\2\0\0\0", "avml-convert"),
        (b"\x28\xb5\x2f\xfd\0", "Content-Encoding: zstd"),
        (b"\x1f\x8b\x08", "Content-Encoding: gzip"),
    ],
)
def test_broken_images_are_told(data: bytes, says: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        contents(data)
    assert says in str(caught.value), str(caught.value)


def test_notes_are_bounded_in_all() -> None:
    """Those of each vCPU become an object: a body that decodes to gigabytes of them must not."""
    assert len(_vcpus(elf_core([(0, b"x")], qemu_note(LONG) * 4096))) == 4096
    with pytest.raises(InvalidValue, match=r"notes of 4194304 bytes at most in all; with .* at byte 64 there"):
        contents(elf_core([(0, b"x")], bytes((4 << 20) + 1)))
    data = bytearray(elf_core([(0, b"x" * (4 << 20)), (1 << 30, b"x")], qemu_note(LONG)))
    struct.pack_into("<I", data, 64 + 56, 4)  # the first range is notes, too
    with pytest.raises(InvalidValue, match="with the program header at byte 120 there are more"):
        contents(bytes(data))


def test_too_many_ranges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MOST_RANGES", 3)
    touching = [(gpa, b"a") for gpa in range(50)]
    assert contents(lime(*touching)) == {0: b"a" * 50}
    with pytest.raises(InvalidValue, match="3 ranges at most"):
        contents(lime(*((gpa * 2, b"a") for gpa in range(4))))


def test_headers_of_lime_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs as much as a page, though they are one range together."""
    monkeypatch.setattr("engine.images.lime._MOST_HEADERS", 3)
    assert contents(lime(*((gpa, b"a") for gpa in range(3)))) == {0: b"aaa"}
    with pytest.raises(InvalidValue, match="3 headers at most; there is another at byte 99"):
        contents(lime(*((gpa, b"a") for gpa in range(4))))


def test_arguments() -> None:
    with pytest.raises(InvalidValue, match="one of auto, raw, elf, lime"):
        open_image("vmss", BytesIO(b""))
    with pytest.raises(InvalidValue, match="goes with raw images"):
        open_image("auto", BytesIO(GOOD), 0)
    with pytest.raises(InvalidValue, match="below 2"):
        open_image("raw", BytesIO(b"a"), 1 << 52)
    with pytest.raises(InvalidValue, match="byte 1 does not"):
        contents(b"ab", "raw", (1 << 52) - 1)
    with pytest.raises(InvalidValue, match="must be an ELF core"):
        contents(b"no ELF core at all", "elf")
