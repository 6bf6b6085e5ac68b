"""Footprints of what requests send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from engine.footprint.places import Footprint
from service.runtime.bodies import Upload
from service.runtime.body_memory import BodyMemory
from service.runtime.footprint_builds import FootprintRequest, build
from service.runtime.replays import Replaying
from service.runtime.traces import SPOOLED_FORMATS
from service.settings import Settings


@asynccontextmanager
async def built_body(
    wanted: FootprintRequest,
    request: Request,
    tenant: str,
    replaying: Replaying,
    memory: BodyMemory,
    settings: Settings,
) -> AsyncIterator[Footprint]:
    """The footprint of the body of ``request``, built while it arrives where its format allows that. Its memory and its
    place are its own until the context ends.

    Raises what ``build`` and reading a body raise.
    """
    turn = replaying.turns.of(tenant)
    with replaying.places.place(tenant):
        async with Upload(request, replaying.executor, settings.body_queue_bytes, turn) as upload:
            spool = None
            if wanted.format in SPOOLED_FORMATS:
                spool = await replaying.spools.fill(upload, tenant, settings.spool_memory_bytes)
            else:
                await upload.begun()
            try:
                with replaying.memory.budget(tenant) as budget, memory.budget(tenant) as room:
                    yield await upload.run(lambda pipe: build(wanted, spool or pipe, pipe.check, budget, room))
            finally:
                if spool is not None:
                    replaying.spools.free(spool, tenant)
