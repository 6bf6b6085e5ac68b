"""A QEMU that does what a test says, where there is a C compiler for the plugin and for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture import plugin

HERE = Path(__file__).parent
STORE, DEVICE, UNKNOWN, SWAPPED = 1 << 8, 1 << 9, 1 << 10, 1 << 11

Fake = Callable[..., list[str]]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The stand-in for QEMU's side of the interface, by its version; skipped where nothing compiles it."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("fake-qemu")
    found = {}
    for version, flags in ((1, ["-DINTERFACE_1"]), (2, ["-DINTERFACE_2"]), (4, [])):
        path = folder / f"fake{version}.so"
        command = ["cc", "-O1", "-fPIC", "-shared", *flags, "-o", str(path), str(HERE / "fake_qemu.c"), "-lpthread"]
        subprocess.run(command, check=True)
        found[version] = path
    return found


@pytest.fixture
def fake(libraries: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes the command line of a guest: ``fake(accesses=[…], run=[vcpus, count], interface=1, …)``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(libraries[1].parent))
    plugin.built()

    def made(*arguments: str, interface: int = 2, **guest: Any) -> list[str]:
        described = tmp_path / "guest.json"
        described.write_text(json.dumps({**guest, "library": str(libraries[interface])}), encoding="utf-8")
        program = tmp_path / "qemu-system-x86_64"
        script = f'#!/bin/sh\nFAKE_GUEST={described} exec {sys.executable} -S -P {HERE / "fake_qemu.py"} "$@"\n'
        program.write_text(script, encoding="utf-8")
        program.chmod(0o755)
        return [str(program), *arguments]

    return made
