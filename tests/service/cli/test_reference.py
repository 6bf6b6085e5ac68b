"""What an operator or a client may meet is documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.trace.option_names import TOOL_FORMATS
from service.cli import reference
from service.problems import PROBLEMS
from service.settings import Settings

PAGE = reference.REFERENCE.read_text(encoding="utf-8")


def test_is_current() -> None:
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `SUBPAGE_{name.upper()}` |")]
    _, kind, default, about = row.strip("| ").split(" | ", 3)
    assert kind and default and len(about) > 10


@pytest.mark.parametrize("code", list(PROBLEMS))
def test_every_problem_type_is_documented(code: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{code}` |")]
    assert f"| {PROBLEMS[code].status} |" in row


def test_nothing_else_is_documented() -> None:
    named = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert set(named) == {f"SUBPAGE_{name.upper()}" for name in Settings.model_fields} | set(PROBLEMS)


def test_write_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reference.md"
    assert reference.main(["--check", "--file", str(file)]) == 1
    assert reference.main(["--write", "--file", str(file)]) == 0
    assert reference.main(["--check", "--file", str(file)]) == 0
    assert "not current" in capsys.readouterr().err


def test_every_format_is_documented() -> None:
    page = reference.TRACES.read_text(encoding="utf-8")
    assert page == reference.traces_text(page)
    for name in TOOL_FORMATS:
        assert f"| `{name}` |" in page or name == "auto"
