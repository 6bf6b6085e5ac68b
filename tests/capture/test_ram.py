"""Where a guest's RAM is, and what is behind it: what is made of QEMU's answers, against a stand-in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capture.errors import CaptureError
from capture.qemu import Guest
from capture.ram import Backing, RamRange, ram_ranges
from capture.recording import Recording, Wanted
from tests.capture.conftest import Fake
from tests.capture.fake_qemu import TREE

GIB = 1 << 30
SECOND = "  0000000040000000-000000007fffffff (prio 0, ram): m1\n"
ABOVE = "  0000000100000000-000000013fffffff (prio 0, ram): {block} @00000000c0000000\n"


def test_ram_is_told_below_and_above_4_gib_and_where_its_block_has_it() -> None:
    assert ram_ranges(TREE.format(last=GIB - 1)) == (RamRange(0, GIB, "pc.ram", 0),)
    above = ABOVE.format(block="pc.ram")
    expected = (RamRange(0, 3 * GIB, "pc.ram", 0), RamRange(4 * GIB, GIB, "pc.ram", 3 * GIB))
    assert ram_ranges(TREE.format(last=3 * GIB - 1) + above) == expected
    with pytest.raises(CaptureError, match="does not tell where"):
        ram_ranges("")


def test_memory_backends_of_several_nodes_are_all_ram() -> None:
    """And video memory, which no backend is named for, is not."""
    assert ram_ranges(TREE.format(last=GIB - 1) + SECOND, {"m0", "m1"}) == (
        RamRange(0, GIB, "pc.ram", 0),
        RamRange(GIB, GIB, "m1", 0),
    )
    assert len(ram_ranges(TREE.format(last=GIB - 1) + SECOND)) == 1


def test_an_old_qemu_with_several_memory_backends_is_refused(fake: Fake) -> None:
    guest = {"memdev": [{"id": "pc.ram", "share": False}, {"id": "m1", "share": False}], "more_ram": SECOND}
    assert guest_of(fake(**guest)).ranges == ((0, GIB), (GIB, GIB))
    with pytest.raises(CaptureError, match="RAM is of 2 memory backends"):
        guest_of(fake(**guest, interface=1))


def guest_of(command: list[str]) -> Guest:
    with Recording(command, Wanted(), 64) as recording:
        return recording.guest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "guest.ram"
    path.touch()
    return path


def backend(share: bool, **properties: Any) -> dict[str, Any]:
    return {"memdev": [{"id": "pc.ram", "share": share, "size": GIB}], "objects": {"pc.ram": properties}}


def test_a_file_that_is_shared_is_behind_the_ram(fake: Fake, file: Path) -> None:
    """QEMU 8.1 and later tell where in the file the block begins, earlier ones have it begin with the file."""
    assert guest_of(fake(**backend(True, **{"mem-path": str(file)}))).backing == (Backing(str(file), 0),)
    assert guest_of(fake(**backend(True, **{"mem-path": str(file), "offset": 8192}))).backing[0].offset == 8192


def test_a_relative_name_is_one_in_the_folder_of_both(fake: Fake, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert guest_of(fake(**backend(True, **{"mem-path": file.name}))).backing == (Backing(str(file), 0),)


def test_what_shows_no_present_memory_is_not_behind_it_and_why_is_told(fake: Fake, file: Path) -> None:
    for guest, rule in (
        ({}, "is in no file"),
        (backend(True), "is in no file"),  # memory-backend-memfd
        (backend(False, **{"mem-path": str(file)}), f"is a copy of {file} that QEMU keeps to itself (share=off)"),
        (backend(True, **{"mem-path": str(file.parent)}), "is in a file without a name"),
    ):
        (found,) = guest_of(fake(**guest)).backing
        assert found.path is None and rule in found.rule
