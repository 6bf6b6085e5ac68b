"""Jobs and answers under Idempotency-Keys over restarts, and while the store fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.problems import StoreUnavailable
from service.runtime.answers import StoredAnswers
from service.runtime.stored_repository import StoredRepository
from tests.contract.client import ContractClient
from tests.support.http import key, map_of, new_vm
from tests.support.job_calls import ASYNC, WRITES, Gate, ended, post
from tests.support.stores import BREAK, MEND, kind, rows_in, run_sql, serving
from tests.support.waiting import until

# Jobs


def test_jobs_are_known_after_a_restart(store_url: str, gate: Gate) -> None:
    with serving(store_url, shutdown_timeout=0) as service:
        client = service.client
        vms = [new_vm(client) for _ in range(2)]
        gate.opened.set()
        urls = [post(client, vms[0]).headers["Location"]]
        urls.append(post(client, vms[0], {"accesses": [{"gpa": 0, "vcpu": 9}]}).headers["Location"])
        before = [ended(client, url) for url in urls]
        gate.opened.clear()
        gate.begun.clear()
        urls += [post(client, vms[1]).headers["Location"] for _ in range(3)]
        until(lambda: bool(gate.begun))
        before.append(client.post(f"{urls[4]}:cancel").json())
        assert [job["state"] for job in before] == ["succeeded", "failed", "cancelled"]
    with serving(store_url, kept_job_seconds=86400) as service:
        client = service.client
        entries = service.app.state.registry._entries
        after = [client.get(url).json() for url in urls]
        assert all(entry.loaded is None for entry in entries.values()), "looking at jobs reads no machine"
        assert [after[0], after[1], after[4]] == before
        for job in after[2:4]:
            assert job["state"] == "interrupted" and job["finished"] and job["result"] is None
            assert job["error"]["code"] == "interrupted" and job["error"]["status"] == 503
        assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [job["id"] for job in after]
        assert client.get(after[0]["result"]).json()["records"] == 2
        assert [client.get(vm).json()["revision"] for vm in vms] == [2, 1], "nothing half-applied"
        assert client.post(f"{urls[2]}:cancel").json() == after[2]
        gate.opened.set()
        last = post(client, vms[1]).headers["Location"]
        assert ended(client, last)["state"] == "succeeded"
        assert client.get("/v1/jobs").json()["jobs"][-1]["id"] == last.rpartition("/")[2]
        service.app.state.jobs._settings = service.app.state.jobs._settings.model_copy(update={"kept_jobs": 1})
        ended(client, post(client, vms[1]).headers["Location"])
        ended(client, post(client, vms[1]).headers["Location"])
        assert rows_in(store_url, "jobs") == 2, "forgotten ones go with the next that is accepted"


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_crash_leaves_jobs_interrupted(store_url: str, state: str) -> None:
    """What the store says after kill -9; tests/faults has the real one."""
    with serving(store_url) as service:
        vm = new_vm(service.client)
        url = post(service.client, vm).headers["Location"]
        ended(service.client, url)
    run_sql(store_url, f"UPDATE jobs SET state = '{state}', finished = NULL, trace = NULL")
    with serving(store_url) as service:
        job = service.client.get(url).json()
        assert job["state"] == "interrupted" and job["finished"] and job["error"]["code"] == "interrupted"


def test_a_commit_that_fails_fails_the_job(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        before = client.get(vm).json()
        run_sql(store_url, *BREAK[kind(store_url)])
        job = ended(client, post(client, vm).headers["Location"])
        assert job["state"] == "failed" and job["error"]["code"] == "store-unavailable"
        assert client.get(vm).json() == before and client.get(f"{vm}/traces").json()["traces"] == []
        run_sql(store_url, *MEND[kind(store_url)])
        assert ended(client, post(client, vm).headers["Location"])["state"] == "succeeded"
        assert rows_in(store_url, "traces") == 1
    with serving(store_url) as service:
        states = [job["state"] for job in service.client.get("/v1/jobs").json()["jobs"]]
        assert states == ["failed", "succeeded"]


def test_nothing_is_accepted_that_is_not_stored(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        run_sql(store_url, "ALTER TABLE jobs RENAME TO jobs_away")
        assert post(client, vm).status_code == 503
        assert client.get("/v1/jobs").json()["jobs"] == [] and service.app.state.jobs.spools.used == 0
        run_sql(store_url, "ALTER TABLE jobs_away RENAME TO jobs")
        assert ended(client, post(client, vm).headers["Location"])["state"] == "succeeded"


@pytest.mark.parametrize("made", [True, False])
def test_a_commit_of_unknown_outcome(store_url: str, made: bool, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is what the store says, once that can be asked."""
    real, asked = StoredRepository.commit, []

    async def commit(self: StoredRepository, *arguments: Any) -> None:
        if made:
            await real(self, *arguments)
        raise StoreUnavailable("nobody knows", certain=False)

    async def job(self: StoredRepository, name: str) -> Any:
        asked.append(name)
        if len(asked) == 1:
            raise StoreUnavailable("not now")
        return await real_job(self, name)

    real_job = StoredRepository.job
    with serving(store_url) as service:
        vm = new_vm(service.client)
        monkeypatch.setattr(StoredRepository, "commit", commit)
        monkeypatch.setattr(StoredRepository, "job", job)
        gate.opened.set()
        found = ended(service.client, post(service.client, vm).headers["Location"])
        monkeypatch.setattr(StoredRepository, "commit", real)
        assert len(asked) == 2 and found["state"] == ("succeeded" if made else "failed")
        assert service.client.get(vm).json()["revision"] == 1 + made
        assert len(service.client.get(f"{vm}/traces").json()["traces"]) == made
        if made:
            assert service.client.get(found["result"]).status_code == 200


def test_an_end_that_could_not_be_stored_is_stored_later(store_url: str, gate: Gate) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        url = post(client, vm).headers["Location"]
        until(lambda: bool(gate.begun))
        run_sql(store_url, "ALTER TABLE jobs RENAME TO jobs_away")
        assert client.post(f"{url}:cancel").json()["state"] == "cancelled"
        run_sql(store_url, "ALTER TABLE jobs_away RENAME TO jobs")
        board = service.app.state.jobs
        (job,) = board._jobs.values()
        assert not job.stored
        # As when the connection comes back, and nobody else had the store meanwhile.
        loop = job.ended._loop
        loop.call_soon_threadsafe(lambda: board.arrive([], goes_on=True))
        until(lambda: job.stored)
    with serving(store_url) as service:
        assert service.client.get(url).json()["state"] == "cancelled"


def test_another_process_takes_the_store(tmp_path: Any, gate: Gate) -> None:
    url = f"sqlite:///{tmp_path}/subpage.db"
    with serving(url) as first:
        vm = new_vm(first.client)
        jobs_made = [post(first.client, vm).headers["Location"] for _ in range(2)]
        until(lambda: bool(gate.begun))
        mine = list(first.app.state.jobs._jobs.values())
        (tmp_path / "subpage.db.lock").unlink()
        with serving(url) as second:
            until(lambda: all(job.over for job in mine))
            assert {second.client.get(job).json()["state"] for job in jobs_made} == {"interrupted"}
            assert second.client.get(vm).json()["revision"] == 1
            assert first.client.get(jobs_made[0]).status_code == 503
    assert [job.state for job in mine] == ["interrupted"] * 2


# Answers


def test_answers_outlive_the_process(store_url: str) -> None:
    ask: dict[str, Any] = {"json": {"name": "a", "spp": True}, "headers": key("k1")}
    with serving(store_url) as service:
        first = service.client.post("/v1/vms", **ask)
        vm = first.headers["Location"]
        slot = {"slot": 0, "gpa": 0, "size": 1 << 20}
        service.client.put(f"{vm}/memory-slots/0", json={name: slot[name] for name in ("gpa", "size")})
        trace = service.client.post(f"{vm}/traces", json=WRITES, headers=key("k2"))
        job = service.client.post(f"{vm}/traces", json=WRITES, headers=key("k3") | ASYNC)
        refused = service.client.post("/v1/vms", json={"maxphyaddr": 1}, headers=key("k4"))
        assert (trace.status_code, job.status_code, refused.status_code) == (201, 202, 422)
        ended(service.client, job.headers["Location"])
    with serving(store_url) as service:
        client = service.client
        again = [
            client.post("/v1/vms", **ask),
            client.post(f"{vm}/traces", json=WRITES, headers=key("k2")),
            client.post(f"{vm}/traces", json=WRITES, headers=key("k3") | ASYNC),
            client.post("/v1/vms", json={"maxphyaddr": 1}, headers=key("k4")),
        ]
        for old, new in zip((first, trace, job, refused), again, strict=True):
            assert (new.status_code, new.content) == (old.status_code, old.content)
            assert new.headers["Idempotency-Replayed"] == "true"
            assert new.headers.get("Location") == old.headers.get("Location")
        assert len(client.get("/v1/vms").json()["vms"]) == 1
        assert len(client.get(f"{vm}/traces").json()["traces"]) == 2 and len(client.get("/v1/jobs").json()["jobs"]) == 1
        other = client.post("/v1/vms", json={"name": "b"}, headers=key("k1"))
        assert other.status_code == 422 and other.json()["code"] == "idempotency-mismatch"


def test_answers_are_kept_for_their_time_and_in_bounds(store_url: str) -> None:
    with serving(store_url, idempotency_bytes=2000) as service:
        client = service.client
        assert client.post("/v1/vms", json={}, headers=key("a")).status_code == 201
        assert client.post("/v1/vms", json={}, headers=key("b")).status_code == 201
        full = client.post("/v1/vms", json={}, headers=key("c"))
        assert full.status_code == 429 and full.json()["field"] == "idempotency_bytes"
        run_sql(store_url, "UPDATE answers SET until = 1 WHERE key = 'a'")
        assert client.post("/v1/vms", json={}, headers=key("a")).headers.get("Idempotency-Replayed") is None
        run_sql(store_url, "UPDATE answers SET until = 1")
        assert client.post("/v1/vms", json={}, headers=key("c")).status_code == 201
        assert rows_in(store_url, "answers") == 1, "old ones go"


@pytest.fixture
def killed_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    async def keep(*_: Any) -> None:
        raise StoreUnavailable("it was killed")

    monkeypatch.setattr(StoredAnswers, "keep", keep)
    return monkeypatch.undo


def test_what_was_carried_out_is_not_done_again(store_url: str, killed_before_the_answer: Callable[[], None]) -> None:
    """The key is committed with the change, the answer of a replay and of a job with it, too."""
    slot = {"slot": 0, "gpa": 0, "size": 1 << 20}
    ask: dict[str, Any] = {"json": {"spp": True, "memory_slots": [slot]}, "headers": key("k1")}
    stops = {"params": {"on_violation": "stop", "record": "gpa8"}, "content": bytes(8) * 400_000}
    octets = key("k5") | {"Content-Type": "application/octet-stream"}
    with serving(store_url, body_queue_bytes=4096) as service:
        client = service.client
        reply = client.post("/v1/vms", **ask)
        assert reply.status_code == 503 and "was carried out" in reply.json()["detail"]
        vm = f"/v1/vms/{client.get('/v1/vms').json()['vms'][0]['id']}"
        client.put(f"{vm}/subpages?gfn=0", json={"access": [0]})
        frame = client.post(f"{vm}/table-frames", headers=key("k2"))
        trace = client.post(f"{vm}/traces", json=WRITES, headers=key("k3"))
        job = client.post(f"{vm}/traces", json=WRITES, headers=key("k4") | ASYNC)
        stopped = client.post(f"{vm}/traces", headers=octets, **stops)  # type: ignore[arg-type]
        assert {one.status_code for one in (frame, trace, job, stopped)} == {503}
        ended(client, "/v1/jobs/" + client.get("/v1/jobs").json()["jobs"][0]["id"])
        traces = client.get(f"{vm}/traces").json()["traces"]
        revision = client.get(vm).json()["revision"]
    killed_before_the_answer()
    with serving(store_url) as service:
        client = service.client
        lost = client.post("/v1/vms", **ask)
        assert lost.status_code == 409 and lost.json()["code"] == "idempotency-answer-lost"
        assert vm in lost.json()["rule"] and lost.json()["value"] == "k1"
        assert client.post("/v1/vms", json={}, headers=key("k1")).json()["code"] == "idempotency-mismatch"
        lost = client.post(f"{vm}/table-frames", headers=key("k2"))
        assert lost.json()["code"] == "idempotency-answer-lost" and vm in lost.json()["rule"]
        again = client.post(f"{vm}/traces", json=WRITES, headers=key("k3"))
        assert again.status_code == 201 and again.headers["Idempotency-Replayed"] == "true"
        assert again.headers["Location"] == f"{vm}/traces/{again.json()['id']}"
        again = client.post(f"{vm}/traces", json=WRITES, headers=key("k4") | ASYNC)
        assert again.status_code == 202 and again.headers["Idempotency-Replayed"] == "true"
        assert client.get(again.headers["Location"]).json()["state"] == "succeeded"
        # How this one goes on nobody had read when it was committed.
        lost = client.post(f"{vm}/traces", headers=octets, **stops)  # type: ignore[arg-type]
        assert lost.status_code == 409 and f"{vm}/traces/" in lost.json()["rule"]
        assert client.get(f"{vm}/traces").json()["traces"] == traces
        assert client.get(vm).json()["revision"] == revision and len(client.get("/v1/vms").json()["vms"]) == 1


def test_the_end_of_a_job_that_waits_takes_the_key_of_its_cancellation(
    store_url: str, gate: Gate, killed_before_the_answer: Callable[[], None]
) -> None:
    with serving(store_url, running_jobs=1) as service:
        client = service.client
        vm = new_vm(client)
        urls = [post(client, vm).headers["Location"] for _ in range(2)]
        until(lambda: bool(gate.begun))
        assert client.post(f"{urls[1]}:cancel", headers=key("k1")).status_code == 503
        gate.opened.set()
        ended(client, urls[0])
    killed_before_the_answer()
    with serving(store_url) as service:
        assert service.client.get(urls[1]).json()["state"] == "cancelled"
        lost = service.client.post(f"{urls[1]}:cancel", headers=key("k1"))
        assert lost.status_code == 409 and lost.json()["code"] == "idempotency-answer-lost"


def test_a_change_that_failed_does_not_take_its_key(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        run_sql(store_url, *BREAK[kind(store_url)])
        assert client.post(f"{vm}/traces", json=WRITES, headers=key("k")).status_code == 503
        run_sql(store_url, *MEND[kind(store_url)])
        reply = client.post(f"{vm}/traces", json=WRITES, headers=key("k"))
        assert reply.status_code == 201 and "Idempotency-Replayed" not in reply.headers
        assert rows_in(store_url, "answers") == 1


def test_keys_while_the_store_cannot_be_read(store_url: str) -> None:
    with serving(store_url) as service:
        client: ContractClient = service.client
        run_sql(store_url, "ALTER TABLE answers RENAME TO answers_away")
        reply = client.post("/v1/vms", json={}, headers=key("k"))
        assert reply.status_code == 503 and reply.json()["code"] == "store-unavailable"
        run_sql(store_url, "ALTER TABLE answers_away RENAME TO answers")
        assert client.post("/v1/vms", json={}, headers=key("k")).status_code == 201
        assert len(client.get("/v1/vms").json()["vms"]) == 1


def test_a_key_and_a_wait(store_url: str) -> None:
    """What was answered at last counts, not that it was accepted."""
    with serving(store_url) as service:
        vm = new_vm(service.client)
        headers = key("k", Prefer="wait=60")
        first = service.client.post(f"{vm}/traces", json=WRITES, headers=headers)
        assert first.status_code == 201
    with serving(store_url) as service:
        again = service.client.post(f"{vm}/traces", json=WRITES, headers=headers)
        assert again.content == first.content and again.status_code == 201
        assert map_of(service.client, vm, 0) == 0xFFFF_FFFF
