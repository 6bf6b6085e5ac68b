"""Moments as the service tells them."""

from __future__ import annotations

from datetime import UTC, datetime


def stamp(when: datetime | None = None) -> str:
    """RFC 3339 in UTC with six decimals, of now unless given."""
    return (when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
