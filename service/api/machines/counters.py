"""Totals of a machine since its creation."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service.api.common import VmId, documented, find, json_response, router
from service.http.wire_types import Document

routes = router("counters", "/v1/vms/{vm}/counters", reads="read")


class VmCounters(Document):
    """Totals by name; releases add names."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "counters": {
                        "records": 16000000,
                        "writes": 16000000,
                        "violations": 2550,
                        "exits_ept_violation": 14884,
                        "sppt_fills": 17,
                        "frames_ept": 530,
                        "memory_bytes": 2170880,
                    }
                }
            ]
        }
    )

    counters: dict[str, int] = Field(description="Exits by kind, faults, fills, flushes, frames by kind, memory.")


@routes.get(
    "",
    operation_id="getCounters",
    summary="Read counters",
    responses=documented({200: {"model": VmCounters, "description": "The totals."}}, "not-found"),
)
async def get_counters(request: Request, vm: VmId) -> Response:
    return json_response({"counters": find(request, vm).machine.counters()})
