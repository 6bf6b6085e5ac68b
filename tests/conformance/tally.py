"""Counts of a run: what was compared, what was excluded and why, what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from .compare import classify, differing
from .exclusions import RULES, explanation
from .vectors import Outcome, Page, Vector

# Recipes of pages to which nothing but sub-page permissions can deny a write: an EPT violation there is one by SPP.
DENIED_BY_SUBPAGES = frozenset({"random: eligible", "edge: sub-page"})
RANDOM = "random: "


@dataclass(slots=True)
class Tally:
    """What became of all vectors so far; ``random`` and ``edges`` count agreeing outcomes by class."""

    random: Counter[str] = field(default_factory=Counter)
    edges: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, seed: int, vectors: Sequence[Vector], ours: Sequence[Outcome], bochs: Sequence[Outcome]) -> None:
        """Compare one run."""
        for number, (vector, our, their) in enumerate(zip(vectors, ours, bochs, strict=True)):
            names = differing(our, their)
            if not names:
                counter = self.random if vector.origin.startswith(RANDOM) else self.edges
                counter[classify(their, vector.origin in DENIED_BY_SUBPAGES)] += 1
            elif rule := explanation(vector, our, their):
                self.excluded[rule.name] += 1
            else:
                where = f"seed {seed}, vector {number}, {vector.origin}: {', '.join(sorted(names))}"
                self.differences.append("\n".join((where, *_describe(vector, our, their))))

    @property
    def compared(self) -> int:
        """Accesses whose outcomes count: all but the excluded."""
        return self.random.total() + self.edges.total() + len(self.differences)

    @property
    def total(self) -> int:
        """All accesses."""
        return self.compared + self.excluded.total()

    def unused(self) -> list[str]:
        """Rules that explained nothing."""
        return [rule.name for rule in RULES if not self.excluded[rule.name]]

    def lines(self) -> Iterator[str]:
        """The report without its verdict."""
        yield f"{'outcome':24}{'random':>8}{'edges':>8}"
        for name in sorted(self.random | self.edges):
            yield f"{name:24}{self.random[name]:8}{self.edges[name]:8}"
        share = 100 * self.excluded.total() / max(1, self.total)
        yield f"excluded as Bochs faults: {self.excluded.total()} of {self.total} ({share:.1f} %)"
        for rule in RULES:
            yield f"{self.excluded[rule.name]:8}  {rule.name} (SDM {rule.source})"

    def verdict(self) -> str:
        """The line that matters."""
        return f"accesses compared: {self.compared}, differences: {len(self.differences)}"


# Where a test leaves its tally for the report at the end of the session.
TALLY = pytest.StashKey[Tally]()


def _describe(vector: Vector, ours: Outcome, bochs: Outcome) -> Iterator[str]:
    yield f"  {vector.kind.name} of {vector.size} at {vector.linear:#x}"
    yield f"  eptp {vector.eptp:#x} spptp {vector.spptp:#x} secondary controls {vector.secondary:#x}"
    for name, page in (("first", vector.first), ("second", vector.second)):
        yield f"  {name} page: {_describe_page(page)}"
    yield f"  EPT PTE of the guest PTEs {vector.table_pte:#x}, SPPT {_words(vector.table_sppt)}"
    yield f"  engine {_describe_outcome(ours)}"
    yield f"  bochs  {_describe_outcome(bochs)}"


def _describe_page(page: Page) -> str:
    return f"gpa {page.gpa:#x} guest {page.guest_pte:#x} EPT {_words(page.ept)} SPPT {_words(page.sppt)}"


def _describe_outcome(outcome: Outcome) -> str:
    changed = " ".join(f"{address:#x}={value:#x}" for address, value in outcome.changed)
    return (
        f"{outcome.event.name} {outcome.reason} q {outcome.qualification:#x} gpa {outcome.gpa:#x} gla {outcome.gla:#x}"
        f" error {outcome.error_code:#x} landed {outcome.landed} changed [{changed}]"
    )


def _words(words: Sequence[int]) -> str:
    return " ".join(f"{word:#x}" for word in words)
