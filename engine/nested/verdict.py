"""How a check ends an ioctl, and the result that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """The end of an ioctl: an errno by name, or a value it returns. ``detail`` says which part of the check decided."""

    errno: str | None = None
    returns: int = 0
    detail: str | None = None
    says: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """One row of an explanation. ``outcome``: pass, decides, done (an effect) or not reached."""

    check: str
    says: str
    outcome: str
    detail: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {"check": self.check, "says": self.says, "outcome": self.outcome, "detail": self.detail}


def report_in_order(rows: Iterable[tuple[str, str, Callable[[], bool]]]) -> list[CheckReport]:
    """Reports of checks given as id, sentence and "does it refuse": up to the first refusal, the rest not reached."""
    reports: list[CheckReport] = []
    decided = False
    for check, says, refuses in rows:
        outcome = "not reached" if decided else "decides" if refuses() else "pass"
        decided = decided or outcome == "decides"
        reports.append(CheckReport(check, says, outcome))
    return reports


@dataclass(frozen=True)
class SetResult:
    """Result of KVM_SET_NESTED_STATE.

    ``returns`` is what ioctl(2) returns: -1 with ``errno``, 0, or the positive number of a failed entry to L2.
    ``check`` is the id of the step that decided, ``detail`` what in it, ``says`` that step in one sentence. ``trail``
    lists every step of this kernel and vendor in order; ``parts`` the checks inside the steps V21 and SVM, in order, if
    they were asked for and reached.
    """

    returns: int
    errno: str | None
    check: str
    detail: str | None
    says: str
    trail: tuple[CheckReport, ...] = field(repr=False)
    parts: tuple[CheckReport, ...] = field(default=(), repr=False, compare=False)

    @property
    def label(self) -> str:
        """``check`` and ``detail`` in one string."""
        return self.check if self.detail is None else f"{self.check} {self.detail}"
