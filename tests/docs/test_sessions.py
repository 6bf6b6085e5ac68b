"""The README's flows and the guides' sessions, pasted into a shell in order, with the replies that they show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import running

ROOT = Path(__file__).parents[2]
SESSIONS = ("README.md", "docs/nested-state.md", "docs/tlb-flush.md")
GUIDES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))

_SHOWN = "# → "
_MARK = "replied"


def blocks(text: str) -> list[str]:
    """The code blocks that call the service, and those between them."""
    found = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    first = next(position for position, block in enumerate(found) if "http://127.0.0.1:8000" in block)
    return found[first:]


def pasted(blocks: list[str], url: str) -> tuple[str, list[list[str]]]:
    """The commands as one script, with a mark where a reply is shown; and for each the pieces that it shows."""
    script, shown = [], []
    for line in "\n".join(blocks).replace("http://127.0.0.1:8000", url).splitlines():
        if line.startswith(_SHOWN):
            script.append(f"echo; echo {_MARK}")
            shown.append(line.removeprefix(_SHOWN).split(" … "))
        else:
            script.append(line)
    return "\n".join(script), shown


@pytest.mark.jit
@pytest.mark.parametrize("name", SESSIONS)
def test_what_is_pasted_answers_as_shown(name: str) -> None:
    with running() as started:
        script, shown = pasted(blocks((ROOT / name).read_text(encoding="utf-8")), started.url)
        folder = str(Path(sys.executable).parent)  # where the command is, which the README has in .venv
        script = script.replace("$PWD/.venv/bin", folder)
        done = subprocess.run(
            ["bash", "-u"], input=script, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(shown) >= 4
    *replies, rest = done.stdout.split(f"\n{_MARK}\n")
    assert len(replies) == len(shown)
    assert not rest.strip() or '"status": 4' not in rest
    for reply, pieces in zip(replies, shown, strict=True):
        position = 0
        for piece in pieces:
            position = reply.find(piece, position)
            assert position >= 0, f"{piece} is not, or not there, in {reply}"
    problems = [reply for reply, pieces in zip(replies, shown, strict=True) if '"type": "/problems/' in reply]
    assert len(problems) == sum("422" in piece for pieces in shown for piece in pieces), problems


def test_a_reply_that_differs_is_noticed() -> None:
    script, shown = pasted(["curl http://127.0.0.1:8000/v1\n# → one … two\n"], "http://127.0.0.1:1")
    assert script == f"curl http://127.0.0.1:1/v1\necho; echo {_MARK}"
    assert shown == [["one", "two"]]


@pytest.mark.parametrize("name", GUIDES, ids=str)
def test_every_guide_leads_to_the_glossary(name: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert name.name in {"glossary.md", "reference.md"} or "(glossary.md)" in text


@pytest.mark.parametrize("name", [Path("README.md"), Path("CONTRIBUTING.md"), *GUIDES], ids=str)
def test_links_lead_to_files(name: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named = re.findall(r"`((?:docs|engine|service|tests|examples|bench|deploy|openapi)/[\w./-]*)`", text)
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing + [place for place in named if not (ROOT / place).exists()]


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90
