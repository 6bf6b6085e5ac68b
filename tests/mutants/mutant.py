"""A mutant: one line of the engine, the faulty line in its place, and the tests that must fail then."""

from __future__ import annotations

from dataclasses import dataclass


class NotFound(ValueError):
    """The original line is not where the list says, or not only there: the list is older than the code."""


@dataclass(frozen=True)
class Mutant:
    """``line`` and ``fault`` are without indentation; ``function`` says where the line is if it is there repeatedly.

    ``rule`` is what the fault breaks; the manual is the SDM volume 3C unless named.
    """

    id: str
    file: str
    line: str
    fault: str
    rule: str
    tests: tuple[str, ...]
    function: str = ""

    def apply(self, source: str) -> str:
        """The source with the fault. Raises NotFound unless the line is there exactly once."""
        lines = source.split("\n")
        first, end = self._span(lines)
        found = [n for n in range(first, end) if lines[n].strip() == self.line]
        if len(found) != 1:
            place = f"{self.file}, {self.function}()" if self.function else self.file
            raise NotFound(f"{self.id}: {len(found)} lines of {place} are: {self.line}")
        old = lines[found[0]]
        lines[found[0]] = old[: len(old) - len(old.lstrip())] + self.fault
        return "\n".join(lines)

    def _span(self, lines: list[str]) -> tuple[int, int]:
        if not self.function:
            return 0, len(lines)
        starts = [n for n, line in enumerate(lines) if line.lstrip().startswith(f"def {self.function}(")]
        if len(starts) != 1:
            raise NotFound(f"{self.id}: {len(starts)} functions of {self.file} are {self.function}()")
        later = (n for n in range(starts[0] + 1, len(lines)) if lines[n].lstrip().startswith("def "))
        return starts[0], next(later, len(lines))
