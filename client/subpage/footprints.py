"""Footprints: traces reduced to their places, asked what policies cost there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from subpage.bodies import OCTETS, PARQUET, TEXT, body_of
from subpage.core import Core
from subpage.handles import Handle
from subpage.html import Document
from subpage.modes import Awaiting, Blocking, operation, stream
from subpage.policies import policy_of

F = TypeVar("F", bound="FootprintOperations")


class FootprintOperations(Handle):
    """One footprint."""

    _names: ClassVar = {"footprint": "id"}

    @operation("costPolicies")
    async def costs(
        self, /, policies: Iterable[Any], *, memory_slots: Sequence[Mapping[str, Any]] | None = None, **asked: Any
    ) -> list[Document]:
        """What each policy costs, a file or a document each, in order; without slots all is writable memory. ``asked``
        are further members of the question, ``profile`` and ``timeline``. ::

        >>> made = client.create_footprint([{"gpa": 0x10040}, {"gpa": 0x10080}], by="records:1")
        >>> [cost["violations"] for cost in made.costs([{"name": "p", "pages": [[0x10, 1, 0]]}])]
        [2]
        """
        document = {"policies": [policy_of(policy) for policy in policies], "memory_slots": memory_slots, **asked}
        return [Document(cost) for cost in (await self._document("costPolicies", json=document))["costs"]]

    @operation("advisePolicy")
    async def advise(
        self, /, policy: Any, *, memory_slots: Sequence[Mapping[str, Any]] | None = None, **asked: Any
    ) -> Document:
        """What to do about a policy, a file or a document: neighbours that its objects pay for, moves and what they
        save, and with ``per_second`` or ``per_million``, exits that it may cost, what is not worth it. ``asked`` as in
        ``costs``. Of a footprint of bytes. ::

        >>> made = client.create_footprint([0x10000, 0x10040], level="bytes")
        >>> advice = made.advise({"name": "p", "objects": [{"name": "o", "gpa": 0x10040, "size": 8}]}, per_million=0)
        >>> advice["advice"][0]["saves"], advice["within_budget"]["dropped"]
        (1, ['o'])
        """
        document = {"policy": policy_of(policy), "memory_slots": memory_slots, **asked}
        return await self._document("advisePolicy", json=document, patience=None)

    def _rows(self, name: str, order: str) -> AsyncGenerator[Any, None]:
        query = {"order": order}
        return self._core.pages(f"getFootprint{name.title()}", name, path=self._place, query=query)

    @stream("getFootprintPages")
    def pages(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The pages that are accessed, by address or, with ``order="writes"``, those with the most writes first:
        ``next(client.create_footprint([0x10040]).pages())["gfn"]`` is ``'0x10'``."""
        return self._rows("pages", order)

    @stream("getFootprintTimeline")
    def timeline(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The buckets in which something is accessed, of one made with ``by="time:N"`` or ``by="records:N"``:
        ``next(client.create_footprint([0x10040], by="records:1").timeline())["bucket"]`` is ``0``."""
        return self._rows("timeline", order)

    @stream("getFootprintWriters")
    def writers(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The instructions that access something, of one made with ``by="pc"``:
        ``next(client.create_footprint([{"gpa": 0, "pc": 7}], by="pc").writers())["pc"]`` is ``'0x7'``."""
        return self._rows("writers", order)

    @operation("getFootprint")
    async def parquet(self) -> bytes:
        """All of it as a Parquet file, which ``subpage footprint`` takes:
        ``client.create_footprint([0x10040]).parquet()[:4]`` is ``b'PAR1'``."""
        return bytes((await self._call("getFootprint", headers={"Accept": PARQUET})).content)

    @operation("deleteFootprint")
    async def delete(self) -> None:
        """Delete it: ``client.create_footprint([0x10040]).delete()``."""
        await self._call("deleteFootprint")

    def __repr__(self) -> str:
        return f"<footprint {self.id}: {self['places']} places of {self['records']} accesses>"


class Footprint(FootprintOperations, Blocking):
    """A footprint."""


class AsyncFootprint(FootprintOperations, Awaiting):
    """A footprint, with methods to be awaited."""


class FootprintCalls(Generic[F]):
    """What a client does with footprints."""

    _footprint: type[F]
    _core: Core

    @operation("createFootprint")
    async def create_footprint(self, /, source: Any, *, media: str | None = None, **query: Any) -> F:
        """Reduce a trace to its places; ``source`` and ``media`` as in ``vm.replay``, or a footprint as a file.
        ``query`` are the parameters of the call: ``level``, ``by``, ``name``, ``format``, ``record`` and others.
        ``client.create_footprint([{"gpa": 0x10040}, {"gpa": 0x10080}], level="bytes")["places"]`` is ``2``."""
        body = await self._core.transport.away(body_of, source, media, OCTETS if query.get("record") else TEXT)
        options: dict[str, Any] = {"content": body.pieces, "headers": body.headers(), "patience": None}
        options |= {"query": {**body.query, **query}, "again": not body.once}
        return self._footprint(self._core, await self._core.document("createFootprint", **options))

    @operation("mergeFootprints")
    async def merge_footprints(self, /, footprints: Iterable[F | str]) -> F:
        """Add footprints of one level up, or their ids: another one, which is that of all of their traces.
        ``client.merge_footprints([client.create_footprint([0x10040]), client.create_footprint([0])])["records"]`` is
        ``2``."""
        ids = [item if isinstance(item, str) else item.id for item in footprints]
        options: dict[str, Any] = {"json": {"footprints": ids}, "patience": None}
        return self._footprint(self._core, await self._core.document("mergeFootprints", **options))

    @stream("listFootprints")
    def footprints(self) -> AsyncGenerator[F, None]:
        """Those of the tenant that are kept, oldest first: ``len(list(client.footprints())) < 100`` is ``True``."""
        return self._core.pages("listFootprints", "footprints", partial(self._footprint, self._core))

    @operation("getFootprint")
    async def footprint(self, id: str) -> F:
        """One footprint. Raises NotFound.
        ``client.footprint(client.create_footprint([0x10040]).id)["records"]`` is ``1``."""
        return self._footprint(self._core, await self._core.document("getFootprint", path={"footprint": id}))
