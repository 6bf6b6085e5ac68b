"""Where a guest's RAM is, and which file has it: what QEMU's monitor says of both."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from capture.errors import CaptureError
from capture.qmp import Qmp, QmpClosed

_PIECE = re.compile(r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): (\S+)(?: @([0-9a-f]{16}))?")


@dataclass(frozen=True, slots=True)
class RamRange:
    """``size`` bytes of RAM from guest-physical address ``first`` on, which a block has from its byte ``offset`` on."""

    first: int
    size: int
    block: str
    offset: int


@dataclass(frozen=True, slots=True)
class Backing:
    """What a range of RAM is made of: a file that shows the guest's memory as it is, and has the range from ``offset``
    on; or, where ``path`` is None, why there is none."""

    path: str | None
    offset: int
    rule: str = ""


def ram_ranges(tree: str, backends: Collection[str] = ()) -> tuple[RamRange, ...]:
    """RAM by address, from what ``info mtree -f`` prints. Raises CaptureError.

    RAM is what the block at address 0 has, and those of ``backends``, memory backends by name. A block that lies below
    and above 4 GiB is a range each. Where the firmware or a device covers one (0xa0000 to 0xfffff before the guest has
    set the machine up) it still is RAM to a recorder.
    """
    found: dict[tuple[str, int], RamRange] = {}
    known = set(backends)
    for line in _memory_view(tree):
        piece = _PIECE.match(line)
        if piece is None:
            continue
        first, last, block, offset = int(piece[1], 16), int(piece[2], 16), piece[3], int(piece[4] or "0", 16)
        if first == 0:
            known.add(block)
        if _backend(block) not in known and block not in known:
            continue
        # Pieces of one block that are moved by as much are one range.
        before = found.setdefault((block, first - offset), RamRange(first, 0, block, offset))
        found[block, first - offset] = RamRange(before.first, last + 1 - before.first, block, before.offset)
    if not any(each.first == 0 for each in found.values()):
        raise CaptureError("QEMU does not tell where the guest's RAM is")
    return tuple(sorted(found.values(), key=lambda each: each.first))


def _memory_view(tree: str) -> list[str]:
    """The lines of the address space of the processors."""
    for view in tree.split("FlatView #"):
        if re.search(r'^ AS "memory"', view, re.MULTILINE):
            return view.splitlines()
    return []


def _backend(block: str) -> str:
    """The memory backend that a block is of; older machines name the block by its path among QEMU's objects."""
    return block.removeprefix("/objects/")


class Backends:
    """The memory backends of a QEMU that has made its machine."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._shared = {str(each["id"]): bool(each["share"]) for each in qmp.execute("query-memdev") if "id" in each}

    @property
    def names(self) -> Collection[str]:
        return self._shared.keys()

    def behind(self, ram: RamRange) -> Backing:
        """What a range of RAM is made of. The guest writes to a file only where it is shared, and only one that has a
        name can be opened: in a folder QEMU makes one that has none."""
        name = _backend(ram.block)
        path = self._property(name, "mem-path") if name in self._shared else None
        if path is None:
            return Backing(None, 0, "the guest's RAM is in no file")
        place = Path(str(path)).absolute()  # QEMU runs in our folder
        if ".." in place.parts:
            place = place.resolve()
        if not self._shared[name]:
            return Backing(None, 0, f"the guest's RAM is a copy of {place} that QEMU keeps to itself (share=off)")
        if not place.is_file():
            return Backing(None, 0, f"the guest's RAM is in a file without a name (mem-path is the folder {place})")
        return Backing(str(place), ram.offset + int(str(self._property(name, "offset") or 0)))

    def _property(self, name: str, of: str) -> object:
        """None: it has none."""
        try:
            value: object = self._qmp.execute("qom-get", path=f"/objects/{name}", property=of)
        except QmpClosed:
            raise
        except CaptureError:
            return None
        return value
