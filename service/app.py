"""The application: settings in, ASGI out. Several may live in one process, each with its own machines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from engine.warm import warm
from service import __version__, documents
from service.api import (
    accesses,
    capabilities,
    counters,
    exits,
    health,
    memory,
    memory_slots,
    problem_types,
    protections,
    spp,
    subpages,
    tables,
    traces,
    vcpus,
    vms,
    walk,
)
from service.http import handlers
from service.http.gate import StoreGate
from service.http.limits import BodyLimits
from service.runtime.home import home_of
from service.runtime.registry import Registry
from service.settings import Settings

# In the order in which requests look for their route: the most frequent first.
RESOURCES = (
    subpages,
    accesses,
    walk,
    vms,
    memory_slots,
    memory,
    spp,
    protections,
    traces,
    exits,
    tables,
    vcpus,
    counters,
    capabilities,
    health,
    problem_types,
)

logger = logging.getLogger("subpage")

_STATIC = Path(__file__).parent / "static"


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    registry: Registry = app.state.registry
    with ThreadPoolExecutor(settings.replay_threads, "replay") as executor:
        app.state.executor = executor
        app.state.warm = not settings.warm_up
        app.state.draining = False
        registry.home.start(registry, lambda: _see_whether_ready(app))
        warming = asyncio.create_task(_warm_up(app)) if settings.warm_up else None
        _see_whether_ready(app)
        try:
            yield
        finally:
            app.state.draining = True
            _see_whether_ready(app)
            await registry.home.stop()
            if warming is not None:
                warming.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await warming


def _see_whether_ready(app: FastAPI) -> None:
    app.state.ready = app.state.warm and app.state.registry.home.ready and not app.state.draining


async def _warm_up(app: FastAPI) -> None:
    try:
        await asyncio.get_running_loop().run_in_executor(app.state.executor, warm)
    except Exception:
        logger.exception("the kernels cannot be loaded; the service stays unready")
    else:
        app.state.warm = True
        _see_whether_ready(app)


def create_app(settings: Settings | None = None) -> FastAPI:
    """A service with the machines of its store. ``settings`` default to what the environment says."""
    settings = settings or Settings()
    app = FastAPI(
        title=documents.TITLE,
        version=__version__,
        summary=documents.SUMMARY,
        description=documents.DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_tags=documents.TAGS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.registry = Registry(settings, home_of(settings))
    app.state.ready = False
    handlers.install(app)
    app.add_middleware(StoreGate, registry=app.state.registry)
    app.add_middleware(BodyLimits, settings=settings)
    for resource in RESOURCES:
        # Not include_router: for every request it would try one router after the other, longer than a short call takes.
        app.router.routes.extend(resource.routes.routes)
    documents.install(app)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
    return app
