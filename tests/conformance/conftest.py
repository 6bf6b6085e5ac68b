"""Prints the counts of a Bochs run after the results, and the verdict as the last line of the session."""

from __future__ import annotations

import pytest

from .tally import TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, None)
    if tally is not None:
        terminalreporter.section("conformance with Bochs")
        for line in tally.lines():
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, None)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if tally is not None and reporter is not None:
        reporter.line(tally.verdict())
