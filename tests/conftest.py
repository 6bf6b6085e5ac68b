"""What holds for every test: machines live in memory unless a test says where else; a run says what it left out."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

os.environ["SUBPAGE_STORE"] = "memory"

# What runs the tests that a run leaves out by their marker.
COMMANDS = {
    "soak": "make soak, make fault-test",
    "bench": "make bench",
    "image": "make image-test",
    "install": "make install-test",
    "abuse": "make abuse-test",
    "console": "make console-test",
    "scale": "make scale-test",
    "jit": "the compiled run of make test",
}
_COUNTS = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_COUNTS] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        markers = [name for name in COMMANDS if item.get_closest_marker(name)]
        item.config.stash[_COUNTS].update(markers[:1])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist tells the process that prints."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = dict(session.config.stash[_COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects, and leaves out, the same."""
    counts: Counter[str] = node.config.stash[_COUNTS]
    counts |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tests that markers left out. Those that are skipped say what they lack in their reason, which -ra lists."""
    counts = config.stash[_COUNTS]
    if counts:
        terminalreporter.section("left out of this run")
        for name, command in COMMANDS.items():
            if counts[name]:
                terminalreporter.line(f"{counts[name]:4} {name:8} {command}")
