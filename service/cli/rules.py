"""Files of rules that answer for a tool: ``subpage attach --rules``. The first rule that fits an access answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.numbers import number_of
from service.platform.failures import FileError, read_document

ANSWERS = ("skip", "allow", "grant", "retry", "stop", "pass")
_ACCESSES = ("read", "write", "execute")
_MEMBERS = ("object", "access", "vcpu", "gpa", "answer")
_MOST_RULES = 10_000


@dataclass(frozen=True, slots=True)
class Rule:
    """What an access has to be for ``answer``; None is any. ``gpa`` is a first and a last address."""

    answer: str
    object: str | None = None
    access: int | None = None
    vcpu: int | None = None
    gpa: tuple[int, int] | None = None

    def fits(self, exit: Mapping[str, Any]) -> bool:
        """Whether it is about an exit record."""
        return (
            (self.object is None or self.object in exit["objects"])
            and self.access in (None, exit["access"])
            and self.vcpu in (None, exit["vcpu"])
            and (self.gpa is None or self.gpa[0] <= int(exit["gpa"], 16) <= self.gpa[1])
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules in order, and the answer where none fits."""

    rules: tuple[Rule, ...]
    otherwise: str = "skip"

    def answer(self, exit: Mapping[str, Any]) -> str:
        """What becomes of an access."""
        return next((rule.answer for rule in self.rules if rule.fits(exit)), self.otherwise)


def read_rules(path: Path) -> Rules:
    """The rules in a file, TOML or JSON: ``answer``, and ``rules``, each of ``_MEMBERS``. Raises FileError."""
    document = read_document(path)
    try:
        _only(document, ("answer", "rules"), "")
        listed = document.get("rules", [])
        if not isinstance(listed, list) or len(listed) > _MOST_RULES:
            raise ValueError(f"rules: must be a list of {_MOST_RULES:,} rules at most")
        rules = tuple(_rule(item, f"rules[{at}]") for at, item in enumerate(listed))
        return Rules(rules, _one_of(document.get("answer", "skip"), ANSWERS, "answer"))
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def _rule(item: Any, where: str) -> Rule:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: must be an object with an answer")
    _only(item, _MEMBERS, f"{where}.")
    if "answer" not in item:
        raise ValueError(f"{where}.answer: is required")
    answer = _one_of(item["answer"], ANSWERS, f"{where}.answer")
    name, access, vcpu = item.get("object"), item.get("access"), item.get("vcpu")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where}.object: must be the name of an object, not {name!r}")
    if access is not None:
        access = _ACCESSES.index(_one_of(access, _ACCESSES, f"{where}.access"))
    if vcpu is not None and (type(vcpu) is not int or vcpu < 0):
        raise ValueError(f"{where}.vcpu: must be the id of a vCPU, not {vcpu!r}")
    return Rule(answer, name, access, vcpu, _addresses(item.get("gpa"), f"{where}.gpa"))


def _addresses(given: Any, where: str) -> tuple[int, int] | None:
    if given is None:
        return None
    ends = given if isinstance(given, list) else [given, given]
    found = [number_of(str(end)) for end in ends if isinstance(end, (int, str)) and not isinstance(end, bool)]
    if len(ends) != 2 or len(found) != 2 or found[0] is None or found[1] is None or found[0] > found[1]:
        raise ValueError(f"{where}: must be an address, or a list of the first and the last one, not {given!r}")
    return found[0], found[1]


def _one_of(given: Any, names: tuple[str, ...], where: str) -> str:
    if given not in names:
        raise ValueError(f"{where}: must be one of {', '.join(names)}, not {given!r}")
    return str(given)


def _only(item: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(item) - set(names)):
        raise ValueError(f"{where}{unknown[0]}: is no member; there are {', '.join(names)}")
