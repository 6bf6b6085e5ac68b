"""Media types: what a body is, and what the client would like to get."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from starlette.requests import Request

from service.problems import NotAcceptable, UnsupportedMediaType

JSON = "application/json"
NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
ARROW = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"
OCTETS = "application/octet-stream"


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


@functools.lru_cache(maxsize=512)
def _preferred(header: str, offers: tuple[str, ...]) -> str | None:
    wanted: list[tuple[str, float]] = []
    for part in header.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = min(max(float(value), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        if media:
            wanted.append((media, quality))
    best: str | None = None
    best_quality = 0.0
    for offer in offers:
        # RFC 9110 section 12.5.1: the most specific range that matches decides.
        group = offer.partition("/")[0] + "/*"
        for pattern in (offer, group, "*/*"):
            given = [quality for media, quality in wanted if media == pattern]
            if given:
                if max(given) > best_quality:
                    best, best_quality = offer, max(given)
                break
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
    best = _preferred(header, offers)
    if best is None:
        raise NotAcceptable(f"must allow one of {', '.join(offers)}", field="Accept", value=header)
    return best
