"""Footprints added up: those of many traces as one."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import CHANGE, documented, footprints_of, headers, replaying_of, router, settings_of, tenant_of
from service.api.footprints.footprints import EXAMPLE_FOOTPRINT, Footprint, kept, made_as_job
from service.api.traces.jobs import ACCEPTED, PREFER, wanted_async
from service.http.wire_types import Document, examples
from service.runtime.footprint_merges import MOST, MergeRequest, check_alike, merging

routes = router("footprints", "/v1", reads="read", writes="write")


class FootprintMerge(Document):
    """What to add up."""

    model_config = ConfigDict(json_schema_extra=examples({"footprints": [EXAMPLE_FOOTPRINT, "fp_5c09d2ab73e81f46"]}))

    footprints: list[Annotated[str, Field(max_length=64)]] = Field(
        min_length=2, max_length=MOST, description="Ids, in any order; of one level, and apart by the same."
    )


@routes.post(
    "/footprints:merge",
    operation_id="mergeFootprints",
    summary="Add up footprints",
    description=(
        "Another footprint, which is that of all of their traces: its file is the same in whatever order they are "
        "given. They stay as they are. With `Prefer` it becomes a job."
    ),
    status_code=201,
    openapi_extra={"parameters": [PREFER]},
    responses=documented(
        {
            201: {
                "model": Footprint,
                "description": "Added up, and kept.",
                "headers": headers("Location", "Preference-Applied"),
            },
            **ACCEPTED,
        },
        *(problem for problem in CHANGE if problem != "vm-busy"),
    ),
)
async def merge_footprints(request: Request, body: FootprintMerge) -> Response:
    settings, tenant, footprints = settings_of(request), tenant_of(request), footprints_of(request)
    replaying, wanted = replaying_of(request), MergeRequest(tuple(body.footprints))
    wishes = wanted_async(request)
    if wishes is not None:
        await check_alike(footprints, tenant, wanted)
        return await made_as_job(request, wanted, wishes)

    async with (
        replaying.computing(tenant),
        merging(
            footprints,
            tenant,
            wanted,
            settings,
            lambda work: replaying.compute(request, settings.footprint_seconds, work),
        ) as found,
    ):
        return await kept(request, found)
