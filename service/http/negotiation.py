"""Media types: what a body is, and what the client would like to get."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from starlette.requests import Request

from service.http.wire_types import decimal
from service.problems import NotAcceptable, UnsupportedMediaType

JSON = "application/json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
OCTETS = "application/octet-stream"
TEXT = "text/plain"
CSV = "text/csv"

# Longest header whose meaning is remembered.
_REMEMBERED = 1000


def content_type(request: Request, accepted: Sequence[str]) -> str:
    """The media type of the body without its parameters, lower case; one of ``accepted``.

    Raises UnsupportedMediaType, naming those that are accepted.
    """
    given = request.headers.get("content-type", "")
    media = given.partition(";")[0].strip().lower()
    if media not in accepted:
        rule = f"must be one of {', '.join(accepted)}"
        # RFC 9110 section 15.5.16: Accept in a 415 lists what would have been read.
        raise UnsupportedMediaType(rule, field="Content-Type", value=given, headers={"Accept": ", ".join(accepted)})
    return media


def qualities(header: str) -> dict[str, float]:
    """The members of an Accept or Accept-Encoding header in lower case, each with its weight, the best of several."""
    wanted: dict[str, float] = {}
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                quality = _quality(value.strip())
        if name:
            wanted[name] = max(quality, wanted.get(name, 0.0))
    return wanted


def _quality(text: str) -> float:
    """A weight, RFC 9110 section 12.4.2; what is none weighs nothing."""
    number = decimal(text.replace(".", "", 1), most=10_000) if len(text) <= 6 else None
    places = len(text.partition(".")[2])
    return 0.0 if number is None else min(number / 10**places, 1.0)


@functools.lru_cache(maxsize=512)
def _preferred(header: str, offers: tuple[str, ...]) -> str | None:
    wanted = qualities(header)
    best: str | None = None
    best_quality = 0.0
    for offer in offers:
        # RFC 9110 section 12.5.1: the most specific range that matches decides.
        group = offer.partition("/")[0] + "/*"
        quality = next((wanted[pattern] for pattern in (offer, group, "*/*") if pattern in wanted), 0.0)
        if quality > best_quality:
            best, best_quality = offer, quality
    return best


def preferred(request: Request, offers: tuple[str, ...]) -> str:
    """The offer that Accept likes best; among equals the first. No Accept means the first offer.

    Raises NotAcceptable, naming the offers.
    """
    return acceptable(",".join(request.headers.getlist("accept")), offers)


def acceptable(header: str, offers: tuple[str, ...]) -> str:
    """The same of the Accept header itself."""
    if not header:
        return offers[0]
    # Remembered are only headers as clients write them: a long one would be kept for as long as a process lives.
    choose = _preferred if len(header) <= _REMEMBERED else _preferred.__wrapped__
    best = choose(header, offers)
    if best is None:
        raise NotAcceptable(f"must allow one of {', '.join(offers)}", field="Accept", value=header)
    return best
