"""kill -9 of a server with jobs under way: each is done or interrupted, and its machine shows those that are done."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import httpx2
import pytest

from tests.faults.kill import empty_store, wait_until_ready
from tests.faults.nursery import nursery
from tests.support.postgres import MISSING, binaries

JOBS = 12
RECORDS = 250_000
PATIENCE = 60.0
# Rows take their time to be read, so that some of the jobs are under way whenever the server is killed.
BODY = b'{"gpa": 8}\n' * RECORDS
ASYNC = {"Prefer": "respond-async", "Content-Type": "application/x-ndjson"}


def states(http: httpx2.Client, urls: list[str]) -> list[str]:
    return [http.get(url).json()["state"] for url in urls]


def accepted(http: httpx2.Client, vms: list[str]) -> list[tuple[str, str]]:
    """Jobs by turns on each machine, all of them acknowledged; each one's machine and URL."""
    made = []
    for number in range(JOBS):
        vm = vms[number % len(vms)]
        headers = ASYNC | {"Idempotency-Key": f"{vm}-{number}"}
        reply = http.post(f"{vm}/traces", content=BODY, headers=headers)
        assert reply.status_code == 202, reply.text
        made.append((vm, reply.headers["Location"]))
    return made


def check(http: httpx2.Client, vm: str, jobs: list[dict[str, Any]], before: int) -> None:
    """What the machine shows is what its jobs say, in their order."""
    done = [job["state"] == "succeeded" for job in jobs]
    assert {job["state"] for job in jobs} <= {"succeeded", "interrupted"}
    assert done == sorted(done, reverse=True), "in the order of acceptance"
    assert http.get(vm).json()["revision"] == before + sum(done)
    traces = [f"{vm}/traces/{trace['id']}" for trace in http.get(f"{vm}/traces").json()["traces"]]
    results = [job["result"] for job in jobs if job["state"] == "succeeded"]
    assert traces[len(traces) - len(results) :] == results
    assert all(http.get(result).json()["records"] == RECORDS for result in results)
    assert all(job["error"]["code"] == "interrupted" for job in jobs if job["state"] == "interrupted")
    records = http.get(f"{vm}/counters").json()["counters"]["records"]
    assert records == RECORDS * len(traces)


@pytest.mark.jit
@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_kill_with_jobs_under_way(store: str) -> None:
    """Once without warning; once told to stop, where what runs may end and what waits is given up."""
    if store == "postgres" and binaries() is None:
        pytest.skip(MISSING)
    chance = random.Random(store)
    interrupted = 0
    with empty_store(store) as url, nursery() as home:
        server = home.start(store=url)
        wait_until_ready(server)
        with httpx2.Client(base_url=server.url, timeout=30.0) as http:
            document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}]}
            vms = [http.post("/v1/vms", json=document).headers["Location"] for _ in range(2)]
        for told in (None, signal.SIGTERM):
            with httpx2.Client(base_url=server.url, timeout=30.0) as http:
                before = {vm: http.get(vm).json()["revision"] for vm in vms}
                made = accepted(http, vms)
                deadline = time.monotonic() + PATIENCE
                while not any(state != "queued" for state in states(http, [made[0][1]])):
                    assert time.monotonic() < deadline
                time.sleep(chance.uniform(0, 0.05))
            if told:
                os.kill(server.pid, told)
                while server.alive():
                    assert time.monotonic() < deadline + PATIENCE
                    time.sleep(0.01)
            else:
                server.kill()
            server = home.start(store=url)
            wait_until_ready(server)
            with httpx2.Client(base_url=server.url, timeout=30.0) as http:
                for vm in vms:
                    jobs = [http.get(job).json() for owner, job in made if owner == vm]
                    check(http, vm, jobs, before[vm])
                    interrupted += sum(job["state"] == "interrupted" for job in jobs)
                # The same keys name the same jobs: nothing is done twice.
                headers = ASYNC | {"Idempotency-Key": f"{vms[0]}-0"}
                again = http.post(f"{vms[0]}/traces", content=BODY, headers=headers)
                assert again.headers["Location"] == made[0][1] and again.headers["Idempotency-Replayed"] == "true"
            vms.reverse()
        server.kill()
    assert interrupted
