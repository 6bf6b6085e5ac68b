"""Where two outcomes of one vector differ."""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from .vectors import Event, Outcome

EPT_VIOLATION: Final = 48
EPT_MISCONFIGURATION: Final = 49
SPP_EVENT: Final = 66
SPP_MISS: Final = 1 << 11
PAGE_FAULT: Final = 14
INVALID_CONTROL: Final = 7

# An EPT misconfiguration leaves the guest-linear address undefined (SDM 28.3.3.1); Bochs happens to write it.
UNDEFINED: Final = {EPT_MISCONFIGURATION: frozenset({"gla"})}


def differing(one: Outcome, other: Outcome) -> frozenset[str]:
    """Names of the fields that differ and are defined for that outcome."""
    names = frozenset(field.name for field in fields(Outcome) if getattr(one, field.name) != getattr(other, field.name))
    if one.event == other.event == Event.EXIT and one.reason == other.reason:
        return names - UNDEFINED.get(one.reason, frozenset())
    return names


def classify(outcome: Outcome, by_subpages: bool) -> str:
    """The class an outcome is counted under; ``by_subpages``: only sub-page permissions can have denied it."""
    if outcome.event == Event.COMPLETED:
        return "allowed"
    if outcome.event == Event.ENTRY_FAILED:
        return "VM entry failed"
    if outcome.event == Event.EXCEPTION:
        return "#PF" if outcome.reason == PAGE_FAULT else f"exception {outcome.reason}"
    if outcome.reason == EPT_VIOLATION:
        return "48 by SPP" if by_subpages else "48 plain"
    if outcome.reason == SPP_EVENT:
        return "66 miss" if outcome.qualification & SPP_MISS else "66 misconfiguration"
    return str(outcome.reason)
