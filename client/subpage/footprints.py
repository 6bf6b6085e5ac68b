"""Footprints: traces reduced to their places, asked what policies cost there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from subpage.bodies import OCTETS, PARQUET, TEXT, body_of
from subpage.core import Core
from subpage.html import Document
from subpage.modes import Awaiting, Blocking, operation, stream
from subpage.policies import policy_of

F = TypeVar("F", bound="FootprintOperations")


class FootprintOperations:
    """One footprint. ``document`` is what the service says of it; items are its members."""

    def __init__(self, core: Core, found: Mapping[str, Any]) -> None:
        self._core, self.document = core, Document(found)
        self._place = {"footprint": self.id}

    @property
    def id(self) -> str:
        """Its id, ``fp_…``."""
        return str(self.document["id"])

    def __getitem__(self, member: str) -> Any:
        return self.document[member]

    @operation("costPolicies")
    async def costs(
        self,
        policies: Iterable[Any],
        *,
        memory_slots: Sequence[Mapping[str, Any]] | None = None,
        profile: str = "kvm-2019",
    ) -> list[Document]:
        """What each policy costs, a file or a document each, in order; without slots all is writable memory. ::

        >>> made = client.create_footprint([{"gpa": 0x10040}, {"gpa": 0x10080}], by="records:1")
        >>> [cost["violations"] for cost in made.costs([{"name": "p", "pages": [[0x10, 1, 0]]}])]
        [2]
        """
        asked = [policy_of(policy) for policy in policies]
        document: dict[str, Any] = {"policies": asked, "memory_slots": memory_slots, "profile": profile}
        answer = await self._core.document("costPolicies", path=self._place, json=document)
        return [Document(cost) for cost in answer["costs"]]

    @stream("getFootprintPages")
    async def pages(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The pages that are accessed, by address or, with ``order="writes"``, those with the most writes first. ::

        >>> [page["gfn"] for page in made.pages()]
        ['0x10']
        """
        async for row in self._core.pages("getFootprintPages", "pages", path=self._place, query={"order": order}):
            yield row

    @stream("getFootprintTimeline")
    async def timeline(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The buckets in which something is accessed, of one made with ``by="time:N"`` or ``by="records:N"``. ::

        >>> [row["bucket"] for row in made.timeline()]
        [0, 1]
        """
        async for row in self._core.pages("getFootprintTimeline", "timeline", path=self._place, query={"order": order}):
            yield row

    @stream("getFootprintWriters")
    async def writers(self, order: str = "place") -> AsyncGenerator[Any, None]:
        """The instructions that access something, of one made with ``by="pc"``. ::

        >>> client.create_footprint([{"gpa": 0, "pc": 7}], by="pc").writers().__next__()["pc"]
        '0x7'
        """
        async for row in self._core.pages("getFootprintWriters", "writers", path=self._place, query={"order": order}):
            yield row

    @operation("getFootprint")
    async def parquet(self) -> bytes:
        """All of it as a Parquet file, which ``subpage footprint`` takes. ::

        >>> made.parquet()[:4]
        b'PAR1'
        """
        reply = await self._core.call("getFootprint", path=self._place, headers={"Accept": PARQUET})
        return bytes(reply.content)

    @operation("deleteFootprint")
    async def delete(self) -> None:
        """Delete it. ::

        >>> client.create_footprint([0x10040]).delete()
        """
        await self._core.call("deleteFootprint", path=self._place)

    def __repr__(self) -> str:
        return f"<footprint {self.id}: {self['places']} places of {self['records']} accesses>"

    def _repr_html_(self) -> str:
        return self.document._repr_html_()


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

        ``query`` are the parameters of the call: ``level``, ``by``, ``name``, ``format``, ``record`` and others. ::

        >>> client.create_footprint([{"gpa": 0x10040}, {"gpa": 0x10080}], level="bytes")["places"]
        2
        """
        body = body_of(source, media, OCTETS if query.get("record") else TEXT)
        options: dict[str, Any] = {"content": body.pieces, "headers": body.headers(), "patience": None}
        options |= {"query": {**body.query, **query}, "again": not body.once}
        return self._footprint(self._core, await self._core.document("createFootprint", **options))

    @stream("listFootprints")
    async def footprints(self) -> AsyncGenerator[F, None]:
        """Those of the tenant that are kept, oldest first. ::

        >>> made.id in [found.id for found in client.footprints()]
        True
        """
        async for found in self._core.pages("listFootprints", "footprints"):
            yield self._footprint(self._core, cast(Document, found))

    @operation("getFootprint")
    async def footprint(self, id: str) -> F:
        """One footprint. Raises NotFound. ::

        >>> client.footprint(made.id)["records"]
        2
        """
        return self._footprint(self._core, await self._core.document("getFootprint", path={"footprint": id}))
