"""What a trace says about translations, from its JSON form in a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.trace.translations import Miss, PerformedOperation, StaleTranslation, Translations


def translations_of(kept: Mapping[str, Any] | None) -> Translations:
    """The inverse of ``dataclasses.asdict``; records of before there was any of it have none."""
    if kept is None:
        return Translations()
    return Translations(
        stale=kept["stale"],
        operations=kept["operations"],
        stale_records=tuple(_stale(item) for item in kept["stale_records"]),
        stale_dropped=kept["stale_dropped"],
        operation_records=tuple(_performed(item) for item in kept["operation_records"]),
        operations_dropped=kept["operations_dropped"],
    )


def _stale(item: Mapping[str, Any]) -> StaleTranslation:
    missed = item["missed_by"]
    return StaleTranslation(
        **{**item, "missed_by": None if missed is None else Miss(**{**missed, "flushed": tuple(missed["flushed"])})}
    )


def _performed(item: Mapping[str, Any]) -> PerformedOperation:
    return PerformedOperation(**{**item, "targeted": tuple(item["targeted"]), "flushed": tuple(item["flushed"])})
