"""Where traces may be read for clients: places that the operator lists, and what clients may name below them.

What a client says never becomes part of an address: a host, an option or a credential is the operator's. It names a
bucket and a path, or a path of this machine, whose parts are compared with those of the places.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

SCHEMES = ("s3", "gs")
LONGEST = 1024
_PARTS = 64
ANY = "**"  # a part of a pattern: any folders

_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://([^/]*)(?:/(.*))?", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_TENANT = re.compile(r"(?:([^=/:?]+)=)?(.*)", re.DOTALL)
_OPTIONS = re.compile(r"(?:[a-z_]+=[A-Za-z0-9.:\[\]_-]*)(?:&[a-z_]+=[A-Za-z0-9.:\[\]_-]*)*")
_WILD = re.compile(r"[*\[]")
# What means something in an address, or is written in one as something else.
_FORBIDDEN = "%?#\\"
_FORM = "must be an absolute path, or s3://BUCKET/KEY or gs://BUCKET/KEY; * stands for a part of a name, ** for folders"


class NotAllowed(Exception):
    """A source that is not read for this client; the text is the rule."""


def _root_and_parts(text: str) -> tuple[str, list[str]] | None:
    """A bucket with its scheme, or nothing, and the parts of the path there. None for what is neither."""
    if text.startswith("/"):
        return "", text[1:].split("/")
    found = _ADDRESS.fullmatch(text)
    if found is None or _BUCKET.fullmatch(found[2]) is None:
        return None
    return f"{found[1]}://{found[2]}", (found[3] or "").split("/")


@dataclass(frozen=True, slots=True)
class Place:
    """One of the operator's: ``root`` as in ``Asked``, the ``parts`` of a path there, and how it is reached; for one
    tenant, or all."""

    root: str
    parts: tuple[str, ...]
    options: str = ""
    tenant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that a setting means. Raises ValueError."""
        match = _TENANT.fullmatch(text)
        assert match is not None
        body, mark, options = match[2].partition("?") if not match[2].startswith("/") else (match[2], "", "")
        found = _root_and_parts(body.rstrip("/") or "/")
        if found is None or not body.isprintable() or (mark and _OPTIONS.fullmatch(options) is None):
            rule = "must be /FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, perhaps with ?OPTION=VALUE behind it"
            raise ValueError(f"{text!r}: {rule} and TENANT= before it")
        root, parts = found
        if parts == [""]:
            parts = []
        if {"", ".", ".."} & set(parts) or _WILD.search(body) or (not root and not parts):
            raise ValueError(f"{text!r}: must be a folder other than /, without .., empty parts and patterns")
        return cls(root, tuple(parts), mark + options, match[1])

    def holds(self, root: str, parts: Sequence[str]) -> bool:
        """Whether a path is below it."""
        count = len(self.parts)
        return root == self.root and len(parts) > count and tuple(parts[:count]) == self.parts

    @property
    def name(self) -> str:
        """What clients are told of it."""
        return f"{self.root}/{'/'.join(self.parts)}"

    @property
    def address(self) -> str:
        """Of the bucket, with how it is reached."""
        return f"{self.root}{self.options}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client names: a file, or a pattern for several. ``root`` is empty for a path of this machine."""

    root: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Raises NotAllowed."""
        if len(text) > LONGEST:
            raise NotAllowed(f"must have at most {LONGEST} characters")
        if not text.isprintable() or (wrong := next((c for c in _FORBIDDEN if c in text), None)) is not None:
            said = "characters that are printed" if not text.isprintable() else f"no {wrong}"
            raise NotAllowed(f"must have {said}: names are taken as they are, and how a store is reached is not theirs")
        found = _root_and_parts(text)
        if found is None:
            raise NotAllowed(_FORM)
        root, parts = found
        if {"", ".", ".."} & set(parts) or len(parts) > _PARTS:
            raise NotAllowed(f"must have at most {_PARTS} parts, and none of them empty, . or ..")
        return cls(root, tuple(parts))

    @property
    def fixed(self) -> int:
        """How many of its parts stand before the first that is a pattern."""
        return next((at for at, part in enumerate(self.parts) if _WILD.search(part)), len(self.parts))


def name_of(root: str, parts: Sequence[str]) -> str:
    """As a client would write it."""
    return f"{root}/{'/'.join(parts)}"


def places_of(texts: Sequence[str], tenant: str) -> list[Place]:
    """Those of a tenant. Raises NotAllowed where there are none."""
    known = [place for place in map(Place.parse, texts) if place.tenant in (None, tenant)]
    if not known:
        raise NotAllowed("the operator lists no place whose traces may be read (SUBPAGE_FOOTPRINT_SOURCES)")
    return known


def place_of(places: Sequence[Place], root: str, parts: Sequence[str]) -> Place:
    """The one that a path is below. Raises NotAllowed."""
    found = next((place for place in places if place.holds(root, parts)), None)
    if found is None or ".." in parts:
        known = " or ".join(place.name for place in places[:10])
        raise NotAllowed(f"must be below {known} (SUBPAGE_FOOTPRINT_SOURCES)")
    return found


def parsed(texts: Sequence[str], places: Sequence[Place]) -> list[tuple[Asked, Place]]:
    """What a client names, each with its place. Raises NotAllowed, whose ``position`` is that of the wrong one."""
    found = []
    for position, text in enumerate(texts):
        try:
            asked = Asked.parse(text)
            # What stands before a pattern is what has to be below: `/data/*` is not below `/data/traces`.
            found.append((asked, place_of(places, asked.root, asked.parts[: asked.fixed + 1])))
        except NotAllowed as error:
            error.position = position  # type: ignore[attr-defined]
            raise
    return found


class Pattern:
    """Which paths a pattern stands for, walked part by part: where one is, is a set of positions in the pattern."""

    def __init__(self, parts: Sequence[str]) -> None:
        self._parts = tuple(parts)
        self._known = [None if part == ANY else re.compile(fnmatch.translate(part)) for part in parts]
        self.begin = self._with_none({0})

    def _with_none(self, at: set[int]) -> frozenset[int]:
        """Positions, with those behind ``**`` that stands for no folder."""
        found, left = set(at), list(at)
        while left:
            position = left.pop()
            if position < len(self._parts) and self._known[position] is None and position + 1 not in found:
                found.add(position + 1)
                left.append(position + 1)
        return frozenset(found)

    def below(self, at: frozenset[int], name: str) -> frozenset[int]:
        """Where one is in a folder of this name; nowhere if nothing below it can be meant."""
        following = set()
        for position in at:
            if position == len(self._parts):
                continue
            known = self._known[position]
            if known is None:
                following.add(position)
            elif position + 1 < len(self._parts) and known.match(name):
                following.add(position + 1)
        return self._with_none(following)

    def means(self, at: frozenset[int], name: str) -> bool:
        """Whether a file of this name, in a folder where one is, is meant."""
        last = len(self._parts) - 1
        if last not in at and last + 1 not in at:
            return False
        known = self._known[last]
        return known is None or (last in at and known.match(name) is not None)
