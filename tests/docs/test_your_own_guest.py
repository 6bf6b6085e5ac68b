"""The tutorial's commands on the files of a guest that the repository has, with the outputs that it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import running

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your-own-guest.md"
SERVICE = "http://127.0.0.1:8000"
_MARK = "of the next command"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def session(text: str) -> list[tuple[str, str]]:
    """Each command behind a prompt, and what it shows."""
    shown = "".join(block for block in blocks(text) if block.startswith("$ "))
    return [(command, output) for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)]


def alike(shown: str) -> re.Pattern[str]:
    """What an output must be, where … is anything, line ends as well."""
    return re.compile(".*".join(re.escape(piece) for piece in shown.strip().split("…")), re.DOTALL)


@pytest.mark.jit
@pytest.mark.skipif(not all(map(shutil.which, ("xz", "zstd", "curl"))), reason="needs xz, zstd and curl")
def test_the_commands_of_the_tutorial_show_what_it_shows(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (unpack,) = (block for block in blocks(text) if block.startswith("xz "))
    steps = session(text)
    assert len(steps) >= 10
    with running() as started:
        script = [unpack.replace("tests/data", f"{ROOT}/tests/data"), f"echo '{_MARK}'"]
        for command, _ in steps:
            script += [command.replace(SERVICE, started.url), f"echo; echo '{_MARK}'"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "SUBPAGE_SERVER": started.url, "COLUMNS": "120"}
        done = subprocess.run(
            ["bash", "-eu"],
            input="\n".join(script),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    _, *outputs, rest = done.stdout.split(f"{_MARK}\n")
    assert len(outputs) == len(steps) and not rest
    for (command, shown), output in zip(steps, outputs, strict=True):
        found = "\n".join(line.rstrip() for line in output.splitlines()).strip()
        assert alike(shown).fullmatch(found), f"{command}\n{found}\nis not\n{shown}"


def test_an_output_that_differs_is_noticed() -> None:
    ((command, shown),) = session("```\n$ subpage vm list\nvm_…  guest\n  slot 0\n```\n")
    assert (command, shown) == ("subpage vm list", "vm_…  guest\n  slot 0\n")
    assert alike(shown).fullmatch("vm_12  guest\n  slot 0") and not alike(shown).fullmatch("vm_12  guest\n  slot 1")
