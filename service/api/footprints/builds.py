"""Footprints of traces that are where the operator lets them be read, so that nobody has to send them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.trace.option_names import RecordFormat
from service.api.common import CHANGE, documented, headers, router, settings_of, tenant_of
from service.api.footprints.footprints import Footprint, made_as_job
from service.api.traces.bodies import COLUMNS_ABOUT, SKIP_ABOUT
from service.api.traces.jobs import ACCEPTED, PREFER, wanted_async
from service.api.traces.traces import static
from service.http.prefer import Preferences
from service.http.wire_types import Document, examples
from service.platform.source_places import LONGEST
from service.problems import InvalidDocument
from service.runtime.footprint_builds import by_of
from service.runtime.source_builds import SourcesRequest
from service.runtime.source_files import asked_for
from service.runtime.trace_files import AUTO, NAMES

routes = router("footprints", "/v1", reads="read", writes="write")

_MOST = 100
_ABOUT_SOURCE = (
    "An absolute path, `s3://BUCKET/KEY` or `gs://BUCKET/KEY`, below what the operator lists; `*` and `[a-z]` stand "
    "for parts of a name, `**` for folders."
)


class FootprintBuild(Document):
    """Which traces to reduce, and how."""

    model_config = ConfigDict(
        json_schema_extra=examples({"sources": ["s3://traces/boots/*.parquet"], "level": "bytes"})
    )

    sources: list[Annotated[str, Field(max_length=LONGEST)]] = Field(
        min_length=1, max_length=_MOST, description=_ABOUT_SOURCE
    )
    level: Literal["spans", "bytes"] = Field("spans", description="As `level` of `createFootprint`.")
    by: str | None = Field(None, max_length=100, description="As `by` of `createFootprint`.")
    format: str = Field(
        AUTO, max_length=20, description=f"Of the files; `auto` recognises each. Else one of {', '.join(NAMES)}."
    )
    record: RecordFormat = Field("record16", description="Layout of packed files.")
    columns: str | None = Field(None, max_length=2000, description=COLUMNS_ABOUT)
    skip_unknown: bool = Field(False, description=SKIP_ABOUT)
    address: Literal["gpa", "gva", "flat"] = Field("gpa", description="As `address` of `createFootprint`.")


@routes.post(
    "/footprints:build",
    operation_id="buildFootprint",
    summary="Reduce traces that the service can reach",
    description=(
        "A job: the files that are named, within `max_source_files` and `max_source_bytes`, are read by the service, "
        "or by the cluster that it has, and added up to one footprint. What is not below a place of the operator's is "
        "refused before anything is looked at. With `Prefer: wait` the footprint itself, if it is there in time."
    ),
    status_code=201,
    openapi_extra={"parameters": [PREFER]},
    responses=documented(
        {
            201: {
                "model": Footprint,
                "description": "Built while the client waited, and kept.",
                "headers": headers("Location", "Preference-Applied"),
            },
            **ACCEPTED,
        },
        *(problem for problem in CHANGE if problem not in ("not-found", "vm-busy")),
        "invalid-trace",
        "cluster-unavailable",
    ),
)
async def build_footprint(request: Request, body: FootprintBuild) -> Response:
    settings, tenant = settings_of(request), tenant_of(request)
    asked_for(body.sources, settings.footprint_sources, tenant)
    static(body.address)
    if body.format not in (AUTO, *NAMES):
        raise InvalidDocument(f"must be auto or one of {', '.join(NAMES)}", field="format", value=body.format)
    wanted = SourcesRequest(
        tuple(body.sources),
        body.level,
        by_of(body.by),
        body.format,
        body.record,
        body.skip_unknown,
        body.columns,
        body.address,
    )
    return await made_as_job(request, wanted, wanted_async(request) or Preferences())
