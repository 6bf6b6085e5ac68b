"""Policies of several kinds, and what replays of them come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ["a", "b", "pages"]
# Every exit is kept, and grants change the machine while it is replayed.
OPTIONS = ("--on-violation", "grant", "--include", "all", "--exits", "50")

_MACHINE = """
name = "b"
[vm]
profile = "kvm-latest"
memory_slots = [{slot = 0, gpa = 0, size = "0x80000"}]
[[protections]]
name = "kernel"
objects = [{name = "object", gpa = "0x2000", size = 4096}]
"""


def policies_in(folder: Path) -> Path:
    """Three policies: objects, a whole machine of another KVM with little memory, and pages."""
    (folder / "a.json").write_text(json.dumps({"objects": [{"name": "object", "gpa": "0x1000", "size": 4096}]}))
    (folder / "b.toml").write_text(_MACHINE)
    (folder / "pages.json").write_text(json.dumps({"pages": [[0, 256, 0]]}))
    return folder


def answers(path: Path) -> list[dict[str, Any]]:
    """What is in the file of a run."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["replays"]
    return found
