"""One question to a footprint: a place, a turn, the footprint in memory, and a thread that looks whether to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from engine.footprint.question import Check
from service.api.common import footprints_of, replaying_of, settings_of, tenant_of
from service.runtime.footprints import Asked

T = TypeVar("T")

# What a question about a policy, in a body, may be answered with.
QUESTION = (
    "not-found",
    "malformed-body",
    "body-too-large",
    "unsupported-media-type",
    "invalid-value",
    "limit-exceeded",
    "invalid-trace",
    "not-yet-supported",
)


async def ask(request: Request, footprint: str, work: Callable[[Asked, Check], T]) -> T:
    """What ``work`` makes of a footprint, in a thread. Its check is called before memory is taken, and every moment.

    Raises what ``Replaying.computing`` and ``compute``, and ``Footprints.asked`` do.
    """
    replaying, tenant = replaying_of(request), tenant_of(request)
    async with replaying.computing(tenant), footprints_of(request).asked(tenant, footprint) as (known, room):

        def answered(going_on: Callable[[], None]) -> T:
            def check(size: int) -> None:
                going_on()
                if size:
                    room.check(size)

            return work(known, check)

        return await replaying.compute(request, settings_of(request).footprint_seconds, answered)
