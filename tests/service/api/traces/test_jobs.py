"""Jobs over HTTP: accepted, waiting, running, cancelled, ended, forgotten."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.http.prefer import Preferences, applied, preferences
from service.runtime import jobs, spool
from service.runtime.job import RUNNING, Job, rows_of_parquet
from service.runtime.spool import JobStopped, Spool
from service.runtime.traces import TraceRequest
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.http import OCTETS
from tests.support.job_calls import ASYNC, WRITES, Gate, ended, post
from tests.support.server import Running, running
from tests.support.waiting import PATIENCE, until


def new_vm(client: ContractClient, **options: Any) -> str:
    document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}], "spp": True}
    return client.post("/v1/vms", json=document, **options).headers["Location"]


@pytest.fixture
def own() -> Iterator[Running]:
    settings = Settings(warm_up=False, running_jobs=2, max_queued_jobs=2, max_job_bytes=1 << 20, busy_timeout=0.05)
    with running(settings) as service:
        yield service


# Prefer


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Preferences()),
        (["respond-async"], Preferences(True)),
        (["Respond-Async"], Preferences(True)),
        (["respond-async;foo=1; bar"], Preferences(True)),
        (["wait=10"], Preferences(False, 10)),
        (['wait="10"'], Preferences(False, 10)),
        (["wait = 10"], Preferences(False, 10)),
        (["respond-async, wait=10"], Preferences(True, 10)),
        (["respond-async", "wait=10"], Preferences(True, 10)),
        (["wait=10, wait=20"], Preferences(False, 10)),
        (["return=minimal, handling=lenient"], Preferences()),
        (['foo="a, respond-async", wait=3'], Preferences(False, 3)),
        (["wait=soon, respond-async"], Preferences(True)),
        (["wait=-1"], Preferences()),
        (["wait"], Preferences()),
        (["wait=²"], Preferences()),
        (["respond-async=yes"], Preferences(True)),
        ([" , ,respond-async"], Preferences(True)),
        (['foo="unended, wait=1'], Preferences(False, 1)),
    ],
)
def test_prefer(headers: list[str], expected: Preferences) -> None:
    """RFC 7240 section 2: the first of the same name counts, what is not understood is ignored."""
    assert preferences(headers) == expected


def test_preference_applied() -> None:
    assert applied() == {}
    assert applied(respond_async=True) == {"Preference-Applied": "respond-async"}
    assert applied(respond_async=True, wait=2.0) == {"Preference-Applied": "respond-async, wait=2"}


# The way of a job


def test_respond_async(client: ContractClient, make_vm: Callable[..., str]) -> None:
    vm = make_vm()
    client.put(f"{vm}/subpages?gfn=1", json={"access": [0]})
    reply = post(client, vm)
    assert reply.status_code == 202 and reply.headers["Preference-Applied"] == "respond-async"
    job, url = reply.json(), reply.headers["Location"]
    assert url == f"/v1/jobs/{job['id']}" and job["vm"] == vm.rpartition("/")[2] and reply.headers["Retry-After"]
    assert job["state"] in ("queued", "running") and job["result"] is None and job["created"].endswith("Z")
    done = ended(client, url)
    assert done["state"] == "succeeded" and done["error"] is None and done["eta"] is None
    assert done["records_done"] == 2 and done["rate"] > 0
    assert done["created"] <= done["started"] <= done["finished"]
    result = client.get(done["result"]).json()
    assert (result["records"], result["violations"]) == (2, 1) and len(result["exit_records"]) == 1
    assert [trace["id"] for trace in client.get(f"{vm}/traces").json()["traces"]] == [result["id"]]
    last = client.get(url)
    assert "Retry-After" not in last.headers
    assert client.get(url, headers={"If-None-Match": last.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize("media", ["ndjson", "packed", "parquet", "arrow"])
def test_every_format(media: str, client: ContractClient, make_vm: Callable[..., str]) -> None:
    vm = make_vm()
    table = pa.table({"gpa": pa.array(range(0x1000, 0x1000 + 800, 8), pa.uint64())})
    sink = io.BytesIO()
    if media == "parquet":
        pq.write_table(table, sink)
    elif media == "arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif media == "ndjson":
        sink.write(b"".join(b'{"gpa": %d}\n' % gpa for gpa in table["gpa"].to_pylist()))
    else:
        sink.write(np.asarray(table["gpa"], dtype="<u8").tobytes())
    names = {"ndjson": "x-ndjson", "packed": "octet-stream", "parquet": "vnd.apache.parquet"}
    headers = ASYNC | {"Content-Type": f"application/{names.get(media, 'vnd.apache.arrow.stream')}"}
    query = {"record": "gpa8"} if media == "packed" else {}
    reply = client.post(f"{vm}/traces", params=query, content=sink.getvalue(), headers=headers)
    assert ended(client, reply.headers["Location"])["records_done"] == 100


def test_wait(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    for prefer, told in (("wait=0", "wait=0"), ("respond-async, wait=0", "respond-async, wait=0")):
        late = client.post(f"{vm}/traces", json=WRITES, headers={"Prefer": prefer})
        assert late.status_code == 202 and late.headers["Preference-Applied"] == told
        client.post(f"{late.headers['Location']}:cancel")
    gate.opened.set()
    for prefer in ("wait=60", "respond-async, wait=60"):
        reply = client.post(f"{vm}/traces", json=WRITES, headers={"Prefer": prefer})
        assert reply.status_code == 201 and reply.headers["Preference-Applied"] == "wait=60"
        assert client.get(reply.headers["Location"]).json() == reply.json() and reply.json()["records"] == 2


def test_what_fails_while_it_is_waited_for_is_answered(own: Running) -> None:
    client, vm = own.client, new_vm(own.client)
    bad = {"accesses": [{"gpa": 8}, {"gpa": 8, "vcpu": 7}]}
    reply = client.post(f"{vm}/traces", json=bad, headers={"Prefer": "wait=60"})
    assert reply.status_code == 422 and reply.json()["code"] == "invalid-trace" and reply.json()["index"] == 1
    (job,) = client.get("/v1/jobs").json()["jobs"]
    assert job["state"] == "failed" and job["error"] == reply.json() and job["result"] is None
    assert client.get(vm).json()["revision"] == 1


def test_a_job_that_is_cancelled_while_it_is_waited_for(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    replies: list[httpx2.Response] = []

    def wait() -> None:
        replies.append(httpx2.post(f"{own.url}{vm}/traces", json=WRITES, headers={"Prefer": "wait=60"}))

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: bool(gate.begun))
    (job,) = client.get("/v1/jobs").json()["jobs"]
    assert client.post(f"/v1/jobs/{job['id']}:cancel").json()["state"] == "cancelled"
    thread.join()
    assert replies[0].status_code == 409 and replies[0].json()["value"] == job["id"]


def test_large_bodies_by_setting() -> None:
    with running(Settings(warm_up=False, async_body_bytes=64)) as service:
        vm = new_vm(service.client)
        ask = f"{vm}/traces?record=gpa8"
        assert service.client.post(ask, content=bytes(56), headers=OCTETS).status_code == 201
        reply = service.client.post(ask, content=bytes(64), headers=OCTETS)
        assert reply.status_code == 202 and "Preference-Applied" not in reply.headers
        assert ended(service.client, reply.headers["Location"])["records_done"] == 8


def test_turns(own: Running, gate: Gate) -> None:
    """One job of a machine at a time, in order; another machine's does not wait for them."""
    client = own.client
    first, other = new_vm(client), new_vm(client)
    one = post(client, first).headers["Location"]
    two = post(client, first).headers["Location"]
    three = post(client, other).headers["Location"]
    until(lambda: len(gate.begun) == 2)
    assert [client.get(url).json()["state"] for url in (one, two, three)] == ["running", "queued", "running"]
    told = client.get(one)
    assert told.headers["Retry-After"] == "1" and told.json()["started"] and told.json()["finished"] is None
    # A client that changes the machine meanwhile is told that it is busy.
    assert client.put(f"{first}/subpages?gfn=1", json={"access": [0]}).json()["code"] == "vm-busy"
    counted = client.get("/metrics").text
    assert 'subpage_jobs{state="running"} 2.0' in counted and 'subpage_jobs{state="queued"} 1.0' in counted
    gate.opened.set()
    done = [ended(client, url) for url in (one, two, three)]
    assert [job["state"] for job in done] == ["succeeded"] * 3
    assert done[0]["finished"] <= done[1]["started"]
    assert 'subpage_jobs_ended_total{state="succeeded"} 3.0' in client.get("/metrics").text


def test_a_job_waits_for_its_machine(own: Running, gate: Gate) -> None:
    gate.opened.set()
    client, vm = own.client, new_vm(own.client)
    lock = own.app.state.registry.get(vm.rpartition("/")[2]).lock
    lock.held = True
    urls = [post(client, vm).headers["Location"] for _ in range(2)]
    until(lambda: any(job.waits for job in own.app.state.jobs._running))
    time.sleep(0.1)  # twice busy_timeout
    assert client.get(urls[0]).json()["state"] == "queued" and not gate.begun
    assert client.post(f"{urls[0]}:cancel").json()["state"] == "cancelled"
    until(lambda: any(job.waits for job in own.app.state.jobs._running))
    (task,) = own.app.state.jobs._running.values()
    task.get_loop().call_soon_threadsafe(lock.give)
    assert ended(client, urls[1])["state"] == "succeeded" and gate.begun == ["json"]


def test_the_same_job_under_the_same_key(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    first = post(client, vm, **{"Idempotency-Key": "k"})
    again = post(client, vm, **{"Idempotency-Key": "k"})
    assert again.content == first.content and again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"] and len(client.get("/v1/jobs").json()["jobs"]) == 1


# Cancelling


def test_cancel(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    before = client.get(vm).json()
    urls = [post(client, vm).headers["Location"] for _ in range(2)]
    until(lambda: bool(gate.begun))
    for url in reversed(urls):  # one that waits, one that runs
        reply = client.post(f"{url}:cancel")
        assert reply.status_code == 200 and reply.json()["state"] == "cancelled" and reply.json()["finished"]
        assert reply.json()["error"] is None and reply.json()["result"] is None
        assert client.post(f"{url}:cancel").json() == reply.json() == client.get(url).json()
    assert client.get(vm).json() == before and client.get(f"{vm}/traces").json()["traces"] == []
    assert client.get(f"{vm}/counters").json()["counters"]["records"] == 0
    gate.opened.set()
    assert client.post(f"{vm}/traces", json=WRITES).status_code == 201, "the machine is free again"
    url = post(client, vm).headers["Location"]
    done = ended(client, url)
    assert client.post(f"{url}:cancel").json() == done and done["state"] == "succeeded"
    assert own.app.state.jobs.spools.used == 0


def test_cancel_of_a_replay_that_does_not_look(
    own: Running, monkeypatch: pytest.MonkeyPatch, client: ContractClient
) -> None:
    go = threading.Event()
    real = jobs.replay

    def deaf(*given: Any) -> Any:
        go.wait(PATIENCE)
        return real(*given)

    monkeypatch.setattr(jobs, "replay", deaf)
    monkeypatch.setattr(jobs, "_NOTICE_SECONDS", 0.01)
    vm = new_vm(own.client)
    url = post(own.client, vm).headers["Location"]
    until(lambda: own.client.get(url).json()["state"] == "running")
    reply = own.client.post(f"{url}:cancel")
    assert reply.status_code == 202 and reply.json()["state"] == "running" and reply.headers["Retry-After"]
    go.set()
    assert ended(own.client, url)["state"] == "cancelled"


def test_unknown_jobs(client: ContractClient) -> None:
    for method, url in (("GET", "/v1/jobs/job_0"), ("POST", "/v1/jobs/job_0:cancel")):
        reply = client.request(method, url)
        assert reply.status_code == 404 and reply.json()["field"] == "job" and reply.json()["value"] == "job_0"


# Bounds


def test_the_queue_is_bounded(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    urls = [post(client, vm).headers["Location"] for _ in range(4)]
    until(lambda: bool(gate.begun))
    while len(urls) < 10:
        reply = post(client, vm)
        if reply.status_code != 202:
            break
        urls.append(reply.headers["Location"])
    assert reply.status_code == 429 and reply.json()["field"] == "max_queued_jobs" and reply.headers["Retry-After"]
    assert client.post(f"{urls[-1]}:cancel").status_code == 200
    assert post(client, vm).status_code == 202


def test_spooled_bytes_are_bounded(own: Running, gate: Gate) -> None:
    client, vm = own.client, new_vm(own.client)
    ask: dict[str, Any] = {"params": {"record": "gpa8"}, "content": bytes(600_000), "headers": ASYNC | OCTETS}
    first = client.post(f"{vm}/traces", **ask).headers["Location"]
    reply = client.post(f"{vm}/traces", **ask)
    assert reply.status_code == 429 and reply.json()["field"] == "max_job_bytes" and reply.headers["Retry-After"]
    assert own.app.state.jobs.spools.used == 600_000
    client.post(f"{first}:cancel")
    assert client.post(f"{vm}/traces", **ask).status_code == 202


def test_a_body_that_cannot_be_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Settings(warm_up=False, spool_dir=tmp_path)) as service:
        vm = new_vm(service.client)
        full = OSError(28, "No space left on device")

        def no_room(**_: Any) -> None:
            raise full

        monkeypatch.setattr(spool.tempfile, "TemporaryFile", no_room)
        reply = post(service.client, vm)
        assert reply.status_code == 503 and "no space left" in reply.json()["detail"] and reply.headers["Retry-After"]
        assert service.client.get("/v1/jobs").json()["jobs"] == [] and service.app.state.jobs.spools.used == 0


def test_bodies_over_the_limit_of_the_call() -> None:
    with running(Settings(warm_up=False, max_body_bytes=100)) as service:
        vm = new_vm(service.client)
        headers = ASYNC | {"Content-Type": "application/x-ndjson"}
        reply = service.client.post(f"{vm}/traces", content=iter([b'{"gpa": 1}\n'] * 20), headers=headers)
        assert reply.status_code == 413 and service.client.get("/v1/jobs").json()["jobs"] == []
        assert service.app.state.jobs.spools.used == 0


def test_pages_and_how_long_jobs_are_known(own: Running) -> None:
    client, vm = own.client, new_vm(own.client)
    ids = []
    for _ in range(5):
        ids.append(post(client, vm).json()["id"])
        ended(client, f"/v1/jobs/{ids[-1]}")
    found: list[str] = []
    page: str | None = "/v1/jobs?limit=2"
    while page:
        document = client.get(page).json()
        assert len(document["jobs"]) <= 2
        found += [job["id"] for job in document["jobs"]]
        page = document["next"]
    assert found == ids
    assert client.get("/v1/jobs?cursor=x").status_code == 422 and client.get("/v1/jobs?limit=0").status_code == 422
    board = own.app.state.jobs
    board._settings = board._settings.model_copy(update={"kept_jobs": 3})
    assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == ids[2:]
    board._settings = board._settings.model_copy(update={"kept_job_seconds": 1e-9})
    assert client.get(f"/v1/jobs/{ids[4]}").status_code == 404 and client.get("/v1/jobs").json()["jobs"] == []


def test_results_go_and_the_job_says_so(own: Running, gate: Gate) -> None:
    client = own.client
    gate.opened.set()
    vm = new_vm(client)
    url = post(client, vm).headers["Location"]
    assert ended(client, url)["result"]
    store = own.app.state.registry.get(vm.rpartition("/")[2]).traces
    store._kept = 1
    client.post(f"{vm}/traces", json=WRITES)
    assert client.get(url).json()["result"] is None and client.get(url).json()["state"] == "succeeded"
    last = post(client, vm).headers["Location"]
    assert ended(client, last)["result"]
    client.delete(vm)
    assert client.get(last).json()["result"] is None


def test_the_machine_goes_before_its_job_runs(own: Running, gate: Gate) -> None:
    client = own.client
    vms = [new_vm(client) for _ in range(3)]
    urls = [post(client, vm).headers["Location"] for vm in vms]
    until(lambda: len(gate.begun) == 2)
    assert client.delete(vms[2]).status_code == 204
    gate.opened.set()
    job = ended(client, urls[2])
    assert job["state"] == "failed" and job["error"]["code"] == "not-found" and job["error"]["field"] == "vm"
    assert job["error"]["instance"] == f"{vms[2]}/traces"


def test_a_defect_fails_the_job_and_tells_nothing(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(jobs, "replay", broken)
    client, vm = own.client, new_vm(own.client)
    job = ended(client, post(client, vm).headers["Location"])
    assert job["state"] == "failed" and job["error"]["code"] == "internal-error" and "secret" not in str(job)
    monkeypatch.undo()
    assert ended(client, post(client, vm).headers["Location"])["state"] == "succeeded"


def test_tenants() -> None:
    now = datetime.now(UTC)
    records, headers = [], {}
    for tenant in ("red", "blue"):
        record, token = mint(tenant, tenant=tenant, scope="write", now=now)
        records.append(record)
        headers[tenant] = {"Authorization": f"Bearer {token}"}
    with running(Settings(warm_up=False), MemoryTokens(records)) as service:
        client = service.client
        vm = new_vm(client, headers=headers["red"])
        reply = post(client, vm, **headers["red"])
        assert post(client, vm, **headers["blue"]).status_code == 404
        url = reply.headers["Location"]
        ended(client, url, headers=headers["red"])
        for method, path in (("GET", url), ("POST", f"{url}:cancel")):
            foreign = client.request(method, path, headers=headers["blue"])
            assert foreign.status_code == 404 and foreign.json()["field"] == "job"
        assert client.get("/v1/jobs", headers=headers["blue"]).json()["jobs"] == []
        assert len(client.get("/v1/jobs", headers=headers["red"]).json()["jobs"]) == 1


# The end of the service


def test_no_new_jobs_while_draining_and_running_ones_end(gate: Gate) -> None:
    with running(Settings(warm_up=False, shutdown_timeout=60)) as service:
        client = service.client
        vms = [new_vm(client) for _ in range(2)]
        post(client, vms[0])
        post(client, vms[0])
        until(lambda: bool(gate.begun))
        service.app.state.jobs.drain()
        reply = post(client, vms[1])
        assert reply.status_code == 503 and reply.headers["Retry-After"] and reply.json()["code"] == "not-ready"
        listed = list(service.app.state.jobs._jobs.values())
        threading.Timer(0.2, gate.opened.set).start()
    assert [job.state for job in listed] == ["succeeded", "interrupted"]
    assert listed[1].error is not None and listed[1].error["code"] == "interrupted"


def test_jobs_that_take_too_long_are_interrupted(gate: Gate) -> None:
    with running(Settings(warm_up=False, shutdown_timeout=0)) as service:
        vm = new_vm(service.client)
        post(service.client, vm)
        until(lambda: bool(gate.begun))
        entry = service.app.state.registry.get(vm.rpartition("/")[2])
        (job,) = service.app.state.jobs._jobs.values()
    assert job.state == "interrupted" and entry.revision == 1 and job.spool is None


# What a job knows of itself


class Done:
    records_done = 0


def under_way(format: str, record: str | None, body: bytes, start: int = 0) -> Job:
    job = Job(1, "job_1", "default", "vm_1", datetime.now(UTC))
    job.wanted = TraceRequest(format, record, (), "skip", "violations", start, 0)
    job.spool = Spool(io.BytesIO(body), len(body))
    job.begin()
    job.source(1 << 20)
    job.began = time.monotonic() - 10
    return job


@pytest.mark.parametrize(
    ("format", "record", "start", "expected"),
    [
        ("packed", "gpa8", 0, 90.0),  # 1000 records, 100 in 10 s
        ("packed", "record16", 0, 40.0),  # 500
        ("packed", "gpa8", 500, 40.0),  # half of them are not run
        ("ndjson", None, 0, 30.0),  # a quarter read
        ("arrow", None, 0, 30.0),
        ("json", None, 0, 30.0),
    ],
)
def test_eta(format: str, record: str | None, start: int, expected: float | None) -> None:
    job = under_way(format, record, bytes(8000), start)
    assert job.rate is None and job.eta is None and job.retry_after() == 1
    done = Done()
    job.follow(done)
    done.records_done = 100
    assert job.spool is not None
    job.spool.read(2000)
    assert job.rate == pytest.approx(10, rel=0.05)
    assert job.eta == (None if expected is None else pytest.approx(expected, rel=0.05))
    assert job.retry_after() == (1 if expected is None else 30)
    job.state = RUNNING
    done.records_done = 10_000
    job.spool.read()
    assert not job.eta


def test_rows_of_parquet() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"gpa": pa.array(range(1000), pa.uint64())}), sink)
    job = under_way("parquet", None, sink.getvalue())
    assert job.total == 1000 and job.spool is not None and job.spool.tell() == job.spool.taken == 0
    assert rows_of_parquet(Spool(io.BytesIO(b"no parquet at all"), 17), 1 << 20) is None


def test_a_body_that_is_taken_away() -> None:
    job = under_way("ndjson", None, b"abc")
    job.check()
    job.stop("cancelled")
    job.stop("interrupted")
    assert job.halt == "cancelled", "the first reason counts"
    spool = job.spool
    assert spool is not None
    for look in (job.check, spool.read, lambda: spool.readinto(memoryview(bytearray(1)))):
        with pytest.raises(JobStopped):
            look()
    job.let_go()
    assert spool.closed and job.spool is None
