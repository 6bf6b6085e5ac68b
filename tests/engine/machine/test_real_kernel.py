"""Symbols and memory of a real guest (`tests/data/guest`): its kernel is found, and makes the policy that is known."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from engine.images import open_image
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from engine.symbols import formats
from service.cli.symbol_policies import Wanted, policy_from, read_symbols
from tests.support import recorded

DATA = Path(__file__).parents[2] / "data" / "guest"
# Where the guest's kallsyms has _text, less where a kernel is linked.
SLIDE = 0xFFFFFFFFAD600000 - 0xFFFFFFFF81000000


def unpacked(name: str) -> bytes:
    return lzma.decompress((DATA / name).read_bytes())


@pytest.fixture(scope="module")
def kallsyms() -> bytes:
    """Of the guest with KASLR."""
    return unpacked("kallsyms.txt.xz")


@pytest.fixture(scope="module")
def linked() -> bytes:
    """Of the same kernel started with nokaslr: the addresses that it was linked at, as in its System.map."""
    return unpacked("kallsyms-nokaslr.txt.xz")


@pytest.fixture(scope="module")
def core() -> bytes:
    packed = (DATA / "guest.core.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


@pytest.fixture
def guest(core: bytes) -> VirtualMachine:
    seen = open_image("auto", io.BytesIO(core))
    seen.survey()
    slots = [SlotSpec(number, gpa, size) for number, (gpa, size) in enumerate(seen.ranges.all())]
    vm = VirtualMachine.create(VmConfig(), slots)
    vm.load_image(open_image("auto", io.BytesIO(core)))
    return vm


def test_the_kernel_is_found_in_its_memory(guest: VirtualMachine, kallsyms: bytes) -> None:
    place = guest.symbols.load(formats.read(kallsyms)).placement
    assert (place.slide, place.phys_base) == (0, -SLIDE)
    assert place.found_by == "memory: linux_banner at 0x2161900 and phys_base"
    assert place.page_offset is not None and place.page_offset % (1 << 30) == 0


@pytest.mark.parametrize("format", ["kallsyms", "system-map"])
def test_the_slide_of_a_linked_kernel_is_found(guest: VirtualMachine, linked: bytes, format: str) -> None:
    place = guest.symbols.load(formats.read(linked, format)).placement
    assert (place.slide, place.phys_base) == (SLIDE, -SLIDE)


@pytest.mark.parametrize(("file", "phys_base", "moved"), [("-nokaslr", None, 0), ("", -SLIDE, SLIDE)])
def test_a_policy_of_its_symbols_has_the_places_that_are_known(
    file: str, phys_base: int | None, moved: int, tmp_path: Path
) -> None:
    """KASLR left this guest's kernel where it is in physical memory."""
    known = json.loads(recorded.policy("kernel_control_data").read_text(encoding="utf-8"))["objects"]
    wanted = [Wanted.of(f"{item['name']}:{item['size']}") for item in known]
    (tmp_path / "kallsyms").write_bytes(unpacked(f"kallsyms{file}.txt.xz"))
    made = policy_from(read_symbols(tmp_path / "kallsyms", phys_base=phys_base), wanted, "kernel")["objects"]
    assert [(item["name"], item["gpa"], item["size"]) for item in made] == [
        (item["name"], item["gpa"], item["size"]) for item in known
    ]
    assert [int(item["gva"], 16) - moved for item in made] == [int(item["gva"], 16) for item in known]
