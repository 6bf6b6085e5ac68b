"""The application: settings in, ASGI out. Several may live in one process, each with its own machines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware

from engine.warm.processes import CompilerEnded
from engine.warm.progress import progress_lines, progress_on
from engine.warm.whole import Group, compile_kernels, load_kernels
from service import __version__
from service.api.events import events, introspection, kvmi
from service.api.footprints import advice, builds, costs, footprints, merges, places
from service.api.hyperv import hypercalls, hyperv, kvm_pages
from service.api.machines import clones, counters, vm_capabilities, vms
from service.api.memory import dirty, host_memory, memory, memory_slots, symbols
from service.api.nested import evmcs, nested_state
from service.api.processor import msrs, vcpu_features, vcpus
from service.api.protection import page_access, protections, spp, subpages, tables, walk
from service.api.system import capabilities, health, ioctls, metrics, problem_types
from service.api.traces import accesses, exits, jobs, traces
from service.console import routes as console
from service.contract import documents, pages
from service.http import handlers
from service.http.compression import Compression
from service.http.envelope import Envelope
from service.http.idempotency import Idempotency
from service.http.limits import HeldBodies
from service.http.route import HeadRoute
from service.kvmi.attachment import Attachments
from service.runtime import census
from service.runtime.answers import answers_of
from service.runtime.footprints import Footprints
from service.runtime.jobs import Jobs
from service.runtime.memory_files import MemoryFiles
from service.runtime.registry import Registry
from service.runtime.replays import Replaying
from service.runtime.repository import Repository
from service.runtime.shares import Share, Tenants
from service.runtime.turns import Turns
from service.security.access import AccessControl
from service.security.audit import AuditLog
from service.security.token_stores import tokens_of
from service.security.tokens import TokenStore
from service.settings import Settings
from service.storage.urls import MEMORY, StoreUrl
from service.telemetry.metrics import Metrics

# In the order in which requests look for their route: the most frequent first.
RESOURCES = (
    subpages,
    accesses,
    walk,
    vms,
    clones,
    memory_slots,
    memory,
    spp,
    protections,
    traces,
    exits,
    events,
    introspection,
    kvmi,
    jobs,
    footprints,
    merges,
    builds,
    costs,
    advice,
    places,
    tables,
    vcpus,
    nested_state,
    evmcs,
    msrs,
    vcpu_features,
    dirty,
    page_access,
    ioctls,
    vm_capabilities,
    hypercalls,
    hyperv,
    kvm_pages,
    counters,
    symbols,
    capabilities,
    health,
    host_memory,
    metrics,
    problem_types,
)

logger = logging.getLogger("subpage")

# How long the end of the service waits for cancelled requests to let go.
_SETTLE_SECONDS = 5.0


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    registry: Registry = app.state.registry
    # One for each replay under way, whether it has its turn or waits for more of its body, for each question about a
    # footprint that has its turn, and for each job.
    threads = settings.max_replays * 2 + settings.replay_threads + settings.running_jobs
    with ThreadPoolExecutor(threads, "replay") as executor:
        app.state.executor = executor
        app.state.replaying = _replaying(settings, executor, app.state.jobs, lambda: app.state.access.tenants)
        app.state.warm = not settings.warm_up
        app.state.draining = False
        await app.state.access.open()
        app.state.jobs.open(executor)
        registry.repository.start(registry, app.state.jobs, lambda: see_whether_ready(app))
        tasks = [
            asyncio.create_task(app.state.access.keep_fresh(lambda: see_whether_ready(app))),
            asyncio.create_task(app.state.metrics.watch_lag()),
        ]
        stopping = threading.Event()
        if settings.warm_up:
            tasks.append(asyncio.create_task(_warm_up(app, stopping)))
        see_whether_ready(app)
        try:
            yield
        finally:
            drain(app)
            stopping.set()
            end_streams(app)
            await app.state.kvmi.stop()
            await _settled(app)
            await app.state.jobs.stop()
            await registry.repository.stop()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            app.state.audit.close()


def _replaying(settings: Settings, executor: Executor, jobs: Jobs, tenants: Tenants) -> Replaying:
    places = Share("max_replays", settings.max_replays, "replays may be under way at one time", tenants)
    turns = Share("replay_threads", settings.replay_threads, "replays compute at one time", tenants, firm=True)
    return Replaying(executor, places, Turns(turns), jobs.spools, jobs.memory)


async def _settled(app: FastAPI) -> None:
    """Wait until requests that the server gave up have let go of their machines, which takes a moment.

    A replay among them is cancelled: its machine stays as it was before.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLE_SECONDS):
            while app.state.metrics.under_way:  # noqa: ASYNC110 - at the end only; an event would cost every request
                await asyncio.sleep(0.01)


def see_whether_ready(app: FastAPI) -> None:
    state = app.state
    state.ready = state.warm and state.registry.repository.ready and state.access.known and not state.draining


def drain(app: FastAPI) -> None:
    """Unready from here on: the service is about to stop."""
    app.state.draining = True
    app.state.jobs.drain()
    see_whether_ready(app)


def end_streams(app: FastAPI) -> None:
    """Let go of those who read events, so that the server need not wait for them. On the event loop, after drain."""
    app.state.registry.end_streams("draining")
    app.state.kvmi.drain()


def _warm(group: Group, stopping: threading.Event) -> None:
    """Compile the kernels where that was never done, and load them.

    What numba keeps of them stays for good; looking for garbage in it takes 60 ms each time.
    """
    report = progress_on(sys.stderr) if group == "first" else progress_lines(logger.info)
    try:
        compile_kernels(group, report, gone=stopping)
    except CompilerEnded:
        logger.exception("the kernels are compiled in the service itself, which takes longer and more of its memory")
    if not stopping.is_set():
        load_kernels(group)
        gc.collect()
        gc.freeze()


async def _warm_up(app: FastAPI, stopping: threading.Event) -> None:
    group: Group = "first" if app.state.settings.warm_up == "first" else "all"
    try:
        await asyncio.get_running_loop().run_in_executor(app.state.executor, _warm, group, stopping)
    except Exception:
        logger.exception("the kernels cannot be loaded; the service stays unready")
    else:
        app.state.warm = True
        see_whether_ready(app)


def _repository_of(settings: Settings, files: MemoryFiles) -> Repository:
    """Where the settings say that machines live."""
    url = StoreUrl.parse(settings.store)
    if url.kind == MEMORY:
        return Repository()
    # Here and not above: the database libraries take 25 MB, and a service whose machines live in memory none of it.
    from service.runtime.stored_repository import StoredRepository  # noqa: PLC0415

    return StoredRepository(url, files)


def _watch(metrics: Metrics, registry: Registry, jobs: Jobs) -> None:
    """Metrics that are counted when somebody reads them, and those of each transaction of the store."""
    for counted in (census.of_machines, census.of_logs, census.of_tools):
        metrics.watch(partial(counted, registry))
    metrics.watch(partial(census.of_jobs, jobs))
    registry.repository.observe = metrics.stored


class _State(State):
    """What belongs to an application, as plain attributes: every request looks some up, which the framework's own makes
    ten times as long."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def create_app(settings: Settings | None = None, *, tokens: TokenStore | None = None) -> FastAPI:
    """A service with the machines of its store, and the tokens of it unless it is given others.

    ``settings`` default to what the environment says.
    """
    settings = settings or Settings()
    app = FastAPI(
        title=documents.TITLE,
        version=__version__,
        summary=documents.SUMMARY,
        description=documents.DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_tags=documents.TAGS,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={
            "tracing": settings.telemetry,
            "metrics": settings.telemetry,
            "logs": settings.telemetry,
            "operation_spans": settings.telemetry,
            "auto_configure": settings.telemetry,
        },
        lifespan=_lifespan,
    )
    app.state = _State()
    app.state.settings = settings
    access = app.state.access = AccessControl(settings, tokens if tokens is not None else tokens_of(settings))
    secret = settings.token.get_secret_value() if settings.token is not None else None
    app.state.audit = AuditLog(settings.audit_log, lambda: access.guarded, secret=secret)
    app.state.kvmi = Attachments(settings, access, app.state.audit)
    files = app.state.memory_files = MemoryFiles(settings.memory_files, settings.max_memory_files)
    registry = app.state.registry = Registry(settings, _repository_of(settings, files), lambda: access.tenants)
    app.state.idempotency = Idempotency(
        answers_of(registry.repository, settings.idempotency_seconds), settings.idempotency_bytes
    )
    app.state.bodies = HeldBodies(settings.max_held_body_bytes)
    app.state.metrics = Metrics()
    app.state.footprints = Footprints(settings, registry.repository, lambda: access.tenants)
    app.state.jobs = Jobs(settings, registry, app.state.footprints, app.state.metrics, lambda: access.tenants)
    _watch(app.state.metrics, registry, app.state.jobs)
    app.state.ready = app.state.warm = app.state.draining = False
    handlers.install(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Prefer"],
            expose_headers=["ETag", "Location", "Preference-Applied", "Retry-After", "X-Request-Id"],
        )
    app.add_middleware(Compression)
    # The last one added is the outermost.
    app.add_middleware(Envelope, settings=settings, audit=app.state.audit, metrics=app.state.metrics)
    for resource in RESOURCES:
        # Not include_router: for every request it would try one router after the other, longer than a short call takes.
        app.router.routes.extend(resource.routes.routes)
    pages.install(app)
    app.router.routes.extend(console.routes.routes)
    # The last one: it stands for all the others.
    app.router.routes.append(HeadRoute(app.router.routes))
    app.router.default = handlers.not_found
    return app
