"""Is the process alive, is it ready, which version is it."""

from __future__ import annotations

import platform
from typing import Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from service import __version__
from service.api.common import documented, json_response, router
from service.http.wire_types import Document, examples
from service.problems import NotReady

routes = router("service", reads="public")


class Alive(Document):
    """The event loop turns."""

    model_config = ConfigDict(json_schema_extra=examples({"status": "alive"}))

    status: Literal["alive"] = Field(description="Always `alive`.")


class Ready(Document):
    """Requests are served at full speed."""

    model_config = ConfigDict(json_schema_extra=examples({"status": "ready"}))

    status: Literal["ready"] = Field(description="Always `ready`.")


class Release(Document):
    """Which release this is."""

    model_config = ConfigDict(
        json_schema_extra=examples({"name": "subpage", "version": __version__, "api": "v1", "python": "3.11.7"})
    )

    name: Literal["subpage"] = Field(description="Of the product.")
    version: str = Field(description="Of the release.")
    api: str = Field(description="Version in the path.")
    python: str = Field(description="Of the interpreter.")


@routes.get(
    "/livez",
    operation_id="getLivez",
    summary="Liveness",
    responses=documented({200: {"model": Alive, "description": "Alive."}}),
)
async def livez() -> Response:
    return json_response(Alive(status="alive"))


@routes.get(
    "/readyz",
    operation_id="getReadyz",
    summary="Readiness",
    description=(
        "Answers 503 while the compiled kernels are loaded, while the store is not to be had (another process owns it, "
        "or it failed), and while the service drains."
    ),
    responses=documented({200: {"model": Ready, "description": "Ready."}}, "not-ready"),
)
async def readyz(request: Request) -> Response:
    if not request.app.state.ready:
        raise NotReady(
            request.app.state.registry.repository.trouble or "the service is starting or draining; try again"
        )
    return json_response(Ready(status="ready"))


@routes.get(
    "/version",
    operation_id="getVersion",
    summary="Version",
    responses=documented({200: {"model": Release, "description": "The release."}}),
)
async def version() -> Response:
    return json_response(Release(name="subpage", version=__version__, api="v1", python=platform.python_version()))
