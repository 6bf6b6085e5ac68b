"""How a check ends an ioctl, and the result that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from dataclasses import field as member
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Verdict:
    """The end of an ioctl: an errno by name, or a value it returns. ``detail`` says which part of the check decided."""

    errno: str | None = None
    returns: int = 0
    detail: str | None = None
    says: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """One row of an explanation. ``outcome``: pass, decides, done (an effect) or not reached.

    ``field`` is what the check looks at, by its name in the JSON form of the state where it is part of that, ``found``
    what it found there, None where it was not reached, ``required`` what it takes; all None for a mere effect.
    """

    check: str
    says: str
    outcome: str
    detail: str | None = None
    field: str | None = None
    found: str | None = None
    required: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


class Facts(NamedTuple):
    """What a check looks at, what it finds there, and what it takes."""

    field: str | None = None
    found: str | None = None
    required: str | None = None

    @classmethod
    def of(cls, report: CheckReport) -> Facts:
        """Those of another check's report."""
        return cls(report.field, report.found, report.required)


# Of one check: whether it refuses, and what it looks at.
Inspect = Callable[[], tuple[bool, Facts]]


def report_in_order(rows: Iterable[tuple[str, str, Inspect]]) -> list[CheckReport]:
    """Reports of checks given as id, sentence and inspection: up to the first refusal, the rest not reached."""
    reports: list[CheckReport] = []
    decided = False
    for check, says, inspect in rows:
        refuses, facts = inspect()
        outcome = "not reached" if decided else "decides" if refuses else "pass"
        if decided:
            facts = facts._replace(found=None)
        decided = decided or outcome == "decides"
        if outcome != "decides" and says != facts.required:
            says = f"needs {facts.required}"
        reports.append(CheckReport(check, says, outcome, None, *facts))
    return reports


@dataclass(frozen=True)
class SetResult:
    """Result of KVM_SET_NESTED_STATE.

    ``returns`` is what ioctl(2) returns: -1 with ``errno``, 0, or the positive number of a failed entry to L2.
    ``check`` is the id of the step that decided, ``detail`` what in it, ``says`` that step in one sentence. ``trail``
    lists every step of this kernel and vendor in order; ``parts`` the checks inside the steps V21 and SVM, in order, if
    they were asked for and reached. ``field``, ``found`` and ``required`` are those of what decided.
    """

    returns: int
    errno: str | None
    check: str
    detail: str | None
    says: str
    trail: tuple[CheckReport, ...] = member(repr=False)
    parts: tuple[CheckReport, ...] = member(default=(), repr=False, compare=False)
    field: str | None = member(default=None, compare=False)
    found: str | None = member(default=None, compare=False)
    required: str | None = member(default=None, compare=False)

    @property
    def label(self) -> str:
        """``check`` and ``detail`` in one string."""
        return self.check if self.detail is None else f"{self.check} {self.detail}"
