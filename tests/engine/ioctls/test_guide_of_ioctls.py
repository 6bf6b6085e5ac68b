"""The guide to the binary ABI: whole tables, and no name that the engine does not know."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from engine.ioctls import IOCTLS
from service.api.machines import vm_capabilities
from service.api.nested import evmcs
from service.api.system import capabilities

GUIDE = (Path(__file__).parents[3] / "docs" / "ioctls.md").read_text(encoding="utf-8")


def test_rows_have_as_many_cells_as_their_table() -> None:
    lines = GUIDE.splitlines()
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert line.count("|") == above.count("|"), line


def test_every_ioctl_and_capability_exists() -> None:
    known = "".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in (capabilities, evmcs))
    known += Path(vm_capabilities.__file__ or "").read_text(encoding="utf-8")
    for file in (Path(__file__).parents[3] / "engine").rglob("*.py"):
        known += file.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(KVM_[A-Z0-9_]+)`", GUIDE)):
        if name.startswith("KVM_CAP_"):
            assert re.search(rf"\b(KVM_)?{name.removeprefix('KVM_')}\b", known), name
        elif not name.startswith("KVM_MEM_"):
            assert name in IOCTLS.names, name
