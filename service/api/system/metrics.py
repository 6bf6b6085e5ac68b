"""Metrics for Prometheus."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from service.api.common import documented, metrics_of, router
from service.http.route import permission

routes = router("service")

TEXT = "text/plain"
_EXAMPLE = "# HELP subpage_vms Machines that exist.\n# TYPE subpage_vms gauge\nsubpage_vms 3.0\n"


@routes.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Metrics",
    description=(
        "In the text format of Prometheus, over all tenants: exits by kind, writes replayed, request latency, lag of "
        "the event loop, machines and frames, commits of the store. Needs scope `admin` unless the service is "
        "configured with public metrics."
    ),
    responses=documented(
        {
            200: {
                "description": "The metrics.",
                "content": {TEXT: {"schema": {"type": "string"}, "example": _EXAMPLE}},
            }
        },
    ),
)
@permission("metrics")
async def get_metrics(request: Request) -> Response:
    # Not among the threads that requests wait for: metrics are wanted when those are all taken.
    content = await asyncio.get_running_loop().run_in_executor(None, metrics_of(request).exposition)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")
