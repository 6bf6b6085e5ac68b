"""Jobs: what became of work that the client did not wait for."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import Conflict
from service.api.common import (
    EXAMPLE_TRACE,
    EXAMPLE_VM,
    Cursor,
    Limit,
    documented,
    headers,
    jobs_of,
    json_response,
    router,
    settings_of,
    tagged,
    tagged_reply,
    tenant_of,
)
from service.http import cursors, prefer
from service.http.idempotency import hooks_of, will_answer
from service.http.wire_types import Document, decimal, examples
from service.platform.stamps import stamp
from service.problems import Problem
from service.runtime.job import BODILESS, CANCELLED, RUNNING, SUCCEEDED, Wanted
from service.runtime.job import Job as KnownJob

routes = router("jobs", "/v1/jobs", reads="read", writes="write")

# Positions are moments of creation.
_CURSOR = "jobs by moment"

EXAMPLE_JOB = "job_5d2f80a96c1be743"
JobId = Annotated[str, Path(alias="job", description="Id of the job.", examples=[EXAMPLE_JOB])]
State = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]

_EXAMPLE: dict[str, Any] = {
    "id": EXAMPLE_JOB,
    "state": "succeeded",
    "vm": EXAMPLE_VM,
    "records_done": 16000000,
    "progress": 1.0,
    "rate": 76190476.2,
    "eta": None,
    "result": f"/v1/vms/{EXAMPLE_VM}/traces/{EXAMPLE_TRACE}",
    "error": None,
    "created": "2026-08-22T09:30:00.000000Z",
    "started": "2026-08-22T09:30:00.012000Z",
    "finished": "2026-08-22T09:30:00.222000Z",
}


def _moment(about: str) -> Any:
    return Field(description=f"{about}; RFC 3339, UTC.", json_schema_extra={"format": "date-time"})


class Job(Document):
    """Long work: a replay on a VM, or a footprint that is built or added up."""

    model_config = ConfigDict(json_schema_extra=examples(_EXAMPLE))

    id: str = Field(description="Id of the job.")
    state: State = Field(
        description=(
            "`queued` waits for its turn or its VM; `running`; `succeeded` committed; `failed`, see `error`; "
            "`cancelled` by a client; `interrupted` by the end of the service. Only `succeeded` changed the VM."
        )
    )
    vm: str | None = Field(description="Id of the VM; null where a footprint is built.")
    records_done: int = Field(description="Accesses replayed, or counted, so far.")
    progress: float | None = Field(
        description="How much of it is done, 0 to 1; null where it ended without success.", examples=[1.0]
    )
    rate: float | None = Field(description="Accesses a second.")
    eta: float | None = Field(description="Seconds to its end, where that can be told.")
    result: str | None = Field(description="URL of the result, while it is kept.")
    error: Problem | None = Field(description="Why it failed or was interrupted.")
    created: str = _moment("When it was accepted")
    started: str | None = _moment("When its VM was there for it")
    finished: str | None = _moment("When it ended")


class JobPage(Document):
    """A page of jobs, oldest first."""

    model_config = ConfigDict(json_schema_extra=examples({"jobs": [_EXAMPLE], "next": None}))

    jobs: list[Job] = Field(description="Oldest first.")
    next: str | None = Field(description="URL of the next page; null on the last.")


def _shown(moment: datetime | None) -> str | None:
    return stamp(moment) if moment is not None else None


def job_document(job: KnownJob, with_result: Collection[str] = ()) -> dict[str, Any]:
    """``job`` as it is; ``with_result`` are ids of jobs whose result can be read."""
    rate, eta = job.rate, job.eta
    return {
        "id": job.id,
        "state": job.state,
        "vm": job.vm or None,
        "records_done": job.records_done,
        "progress": _progress(job),
        "rate": None if rate is None else round(rate, 1),
        "eta": None if eta is None else round(eta, 3),
        "result": job.result if job.id in with_result else None,
        "error": job.error,
        "created": _shown(job.created),
        "started": _shown(job.started),
        "finished": _shown(job.finished),
    }


def _progress(job: KnownJob) -> float | None:
    if job.state == RUNNING:
        return round(job.share, 4)
    return None if job.over and job.state != SUCCEEDED else float(job.over)


def _retry(job: KnownJob) -> dict[str, str]:
    return {} if job.over else {"Retry-After": str(job.retry_after())}


def wanted_async(request: Request) -> prefer.Preferences | None:
    """What the client prefers, or None if it is to be answered when the work is done."""
    settings = settings_of(request)
    wishes = prefer.preferences(request.headers.getlist("prefer"))
    if wishes.wait is not None:
        wishes = prefer.Preferences(wishes.respond_async, min(wishes.wait, settings.longest_wait))
    length = decimal(request.headers.get("content-length", ""), most=settings.max_body_bytes)
    large = settings.async_body_bytes and length is not None and length >= settings.async_body_bytes
    return wishes if wishes.any or large else None


async def done_as_job(
    request: Request, vm: str, wanted: Wanted, wishes: prefer.Preferences
) -> Response | tuple[str, dict[str, str]]:
    """Accept the body of ``request`` as a job, for the machine ``vm`` or, where that is empty, as a footprint; that of
    what is BODILESS was read already. The reply that says so, or the id of what came of it and the headers of its reply
    if the job has succeeded while the client was willing to wait.

    Raises what the job failed with if that was while the client waited, LimitExceeded, NotReady, StoreUnavailable.
    """
    jobs, tenant = jobs_of(request), tenant_of(request)
    accepted = prefer.applied(respond_async=wishes.respond_async, wait=wishes.wait)
    with jobs.place(tenant):
        spool = None if isinstance(wanted, BODILESS) else await jobs.receive(request, tenant)
        job = await jobs.accept(
            vm,
            tenant,
            wanted,
            spool,
            hooks_of(request),
            lambda job: will_answer(request, _accepted(job, accepted)),
        )
    if wishes.wait is None or not await jobs.wait(job, wishes.wait):
        return _accepted(job, accepted)
    if job.trace is not None:
        return job.trace, prefer.applied(wait=wishes.wait)
    if job.state == CANCELLED:
        raise Conflict("the job was cancelled while its result was waited for", field="job", value=job.id)
    assert job.fault is not None
    raise job.fault


def _accepted(job: KnownJob, extra: dict[str, str]) -> Response:
    return json_response(job_document(job), status=202, extra={"Location": job.url, **_retry(job), **extra})


PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`respond-async`, `wait=seconds` or both, as RFC 7240 has them; others are ignored.",
    "schema": {"type": "string", "examples": ["respond-async", "wait=10"]},
}
# What a route documents that may answer with a job.
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "model": Job,
        "description": "Accepted: known from now on, also after a restart.",
        "headers": headers("Location", "Preference-Applied", "Retry-After"),
    }
}


@routes.get(
    "",
    operation_id="listJobs",
    summary="List jobs",
    description="Those under way, and those that ended within the time that they are kept (a day), oldest first.",
    responses=documented({200: {"model": JobPage, "description": "One page."}}, "invalid-value"),
)
async def list_jobs(request: Request, limit: Limit = None, cursor: Cursor = None) -> Response:
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    after = cursors.decode(_CURSOR, cursor) if cursor is not None else 0
    found, following = jobs_of(request).page(tenant_of(request), after, size)
    kept = await jobs_of(request).with_result(found)
    follow = cursors.next_url("/v1/jobs", _CURSOR, following, limit) if following is not None else None
    return json_response({"jobs": [job_document(job, kept) for job in found], "next": follow})


_JOB = tagged_reply(Job, "As it is now; `Retry-After` while it has not ended.")
_JOB[200]["headers"] |= headers("Retry-After")


@routes.get(
    "/{job:id}",
    operation_id="getJob",
    summary="Read a job",
    responses=documented(_JOB, "not-found"),
)
async def get_job(request: Request, job: JobId) -> Response:
    found = jobs_of(request).get(job, tenant_of(request))
    kept = await jobs_of(request).with_result([found])
    return tagged(request, job_document(found, kept), extra=_retry(found))


@routes.post(
    "/{job:id}:cancel",
    operation_id="cancelJob",
    summary="Cancel a job",
    description=(
        "A job that waits is cancelled at once, one that runs as soon as its replay looks, which it does every 262,144 "
        "accesses; the VM is then as it was before the job. The reply has the job as it is after that: usually "
        "`cancelled`. A job that has ended already stays what it is, and the call changes nothing: it may be repeated. "
        "202 says that the replay has not noticed yet, after five seconds."
    ),
    responses=documented(
        {
            200: {"model": Job, "description": "It has ended."},
            202: {
                "model": Job,
                "description": "It is going to end.",
                "headers": headers("Retry-After"),
            },
        },
        "not-found",
    ),
)
async def cancel_job(request: Request, job: JobId) -> Response:
    found = jobs_of(request).get(job, tenant_of(request))
    await jobs_of(request).cancel(found, hooks_of(request))
    kept = await jobs_of(request).with_result([found])
    return json_response(job_document(found, kept), status=200 if found.over else 202, extra=_retry(found))
