"""The protections of a machine as JSON, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection

_PLAIN = ("subpage", None, None, None, None)


def protection_to_head(protection: Protection) -> dict[str, Any]:
    """A protection as JSON-able values. What is not given is left out, as in heads from before it could be."""
    rows = [astuple(item) for item in protection.objects]
    values: dict[str, Any] = {
        "name": protection.name,
        "objects": [list(row[:3] if row[3:] == _PLAIN else row) for row in rows],
    }
    if protection.ranges:
        values["pages"] = [list(astuple(item)) for item in protection.ranges]
    if protection.about is not None:
        values["about"] = protection.about
    return values


def protection_from_head(values: Mapping[str, Any]) -> Protection:
    """The protection that ``protection_to_head`` wrote."""
    objects = tuple(ProtectedObject(*row) for row in values["objects"])
    ranges = tuple(ProtectedPages(*row) for row in values.get("pages", ()))
    return Protection(values["name"], objects, ranges, values.get("about"))
