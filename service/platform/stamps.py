"""Moments as the service tells them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def stamp(when: datetime | None = None) -> str:
    """RFC 3339 in UTC with six decimals, of now unless given."""
    # Several times as fast as strftime, which counts where questions come in swarms.
    moment = datetime.now(UTC) if when is None else when.astimezone(UTC)
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def moment(time: datetime) -> int:
    """Microseconds of Unix time, exactly: what puts the items of a list in order."""
    return (time - EPOCH) // timedelta(microseconds=1)
