"""Entity tags and the requests that are conditional on them (RFC 9110 section 13)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable

from starlette.requests import Request

from service.problems import PreconditionFailed, PreconditionRequired

_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
# Ends the tag of a coded form. Whoever has one has the state that the plain tag stands for.
_VARIANT = re.compile(r'-(?:gzip|zstd)"$')


def entity_tag(*parts: bytes) -> str:
    """A strong tag: a hash of the representation, so that equal content has equal tags at any time."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return f'"{digest.hexdigest()}"'


def variant(tag: str, coding: str) -> str:
    """The tag of the same content in a coding: another representation, so another tag."""
    return f'{tag[:-1]}-{coding}"'


def _named(header: str, *, weak: bool) -> set[str]:
    """The tags in a header as the service made them; the weak ones only if they count."""
    return {_VARIANT.sub('"', found[2]) for found in _TAG.finditer(header) if weak or not found[1]}


def _given(request: Request, name: bytes) -> str | None:
    """A header as it was sent, the first of several; the framework's look at it takes several times as long."""
    for known, value in request.scope["headers"]:
        if known == name:
            return str(value.decode("latin-1"))
    return None


def not_modified(request: Request, tag: str) -> bool:
    """Whether If-None-Match names ``tag``, so that a GET is answered with 304."""
    header = _given(request, b"if-none-match")
    if header is None:
        return False
    return header.strip() == "*" or tag in _named(header, weak=True)


def require_match(request: Request, current: Callable[[], Iterable[str]], *, required: bool) -> None:
    """Refuse the request unless If-Match, when given, names one of the tags that the resource has now.

    ``current`` is called only when there is something to compare; no tags means that the resource does not exist.
    Raises PreconditionFailed, or PreconditionRequired when ``required`` and the header is missing. A creation is
    guarded by ``If-None-Match: *`` instead.
    """
    match, none_match = _given(request, b"if-match"), _given(request, b"if-none-match")
    if match is None and none_match is None:
        if required:
            raise PreconditionRequired("must be given: the machine was created with require_match", field="If-Match")
        return
    tags = set(current())
    if match is not None:
        # Strong comparison: a weak tag never matches.
        named = _named(match, weak=False)
        if not tags or (match.strip() != "*" and not tags & named):
            raise PreconditionFailed("must name the current state", field="If-Match", value=match)
    if none_match is not None and tags:
        named = _named(none_match, weak=True)
        if none_match.strip() == "*" or tags & named:
            raise PreconditionFailed("must not name the current state", field="If-None-Match", value=none_match)
