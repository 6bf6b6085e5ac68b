"""What was acknowledged is there after a restart, read when it is asked for; what failed never was."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.http import OCTETS, map_of, new_vm, set_map
from tests.support.server import running
from tests.support.stores import BREAK, MEND, kind, picture, rows_in, run_sql, serving
from tests.support.waiting import until


def test_everything_is_there_after_a_restart(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client, name="kept\0and\u2026", vcpus=2)
        empty = new_vm(client)
        assert set_map(client, vm, 3, 0xFFFF_00FF) == 204
        assert client.put(f"{vm}/memory?gpa=4096&size=5", content=b"hello", headers=OCTETS).status_code == 204
        objects = [{"name": "o", "gpa": 0x5000, "size": 300}]
        assert client.post(f"{vm}/protections", json={"name": "p", "objects": objects}).status_code == 201
        for accesses in ([{"gpa": 0x5000, "pc": 7}, {"gpa": 0x9000, "pc": 8}], [{"gpa": 0xA000, "pc": 9}]):
            reply = client.post(f"{vm}/traces", params={"carry": "pc"}, json={"accesses": accesses})
            assert reply.status_code == 201
        gone = new_vm(client)
        assert client.delete(gone).status_code == 204
        before = picture(client, vm)
        listed = client.get("/v1/vms").json()
    assert before[6][0]["exit_records"][0]["objects"] == ["o"] and before[6][0]["exit_records"][0]["pc"] == 7
    with serving(store_url) as service:
        entries = service.app.state.registry._entries
        assert len(entries) == 2 and all(entry.loaded is None for entry in entries.values())
        assert picture(service.client, vm) == before
        assert [entry.loaded is None for entry in entries.values() if entry.id in empty] == [True], (
            "nobody asked for it"
        )
        assert service.client.get("/v1/vms").json() == listed
        assert service.client.get(gone).status_code == 404
        assert set_map(service.client, vm, 4, 1) == 204
        assert service.client.get(vm).json()["revision"] == before[0]["revision"] + 1
        assert service.client.delete(vm).status_code == 204 and service.client.delete(empty).status_code == 204
    for table in ("vms", "blocks", "traces", "trace_parts"):
        assert rows_in(store_url, table) == 0


def test_machines_that_nobody_uses_are_forgotten_and_read_again(store_url: str) -> None:
    with serving(store_url, max_loaded_vms=1) as service:
        client = service.client
        vms = [new_vm(client) for _ in range(3)]
        for word, vm in enumerate(vms):
            assert set_map(client, vm, 1, word) == 204
        client.post(f"{vms[0]}/traces", json={"accesses": [{"gpa": 0x1000}]})
        entries = service.app.state.registry._entries
        assert sum(entry.loaded is not None for entry in entries.values()) == 1
        assert [map_of(client, vm, 1) for vm in vms] == [0, 1, 2]
        assert len(client.get(f"{vms[0]}/traces").json()["traces"]) == 1
        assert [vm["id"] for vm in client.get("/v1/vms").json()["vms"]] == [vm.rpartition("/")[2] for vm in vms]


def test_traces_are_kept_by_count_and_by_age(store_url: str) -> None:
    with serving(store_url, kept_traces=2, loaded_exit_records=0) as service:
        client = service.client
        vm = new_vm(client)
        set_map(client, vm, 1, 0)
        ids = [
            client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0x1000}] * count}).json()["id"]
            for count in (1, 2, 3)
        ]
        assert rows_in(store_url, "traces") == rows_in(store_url, "trace_parts") == 2
        assert client.get(f"{vm}/traces/{ids[0]}").status_code == 404
        # Only the last result is in memory; the one before is read from the store.
        assert [len(client.get(f"{vm}/traces/{name}/exits").json()["exit_records"]) for name in ids[1:]] == [2, 3]
    run_sql(store_url, f"UPDATE traces SET created = '2020-01-01T00:00:00+00:00' WHERE id = '{ids[1]}'")
    with serving(store_url, kept_trace_days=1) as service:
        client = service.client
        assert client.get(f"{vm}/traces/{ids[1]}").status_code == 404
        assert [trace["id"] for trace in client.get(f"{vm}/traces").json()["traces"]] == [ids[2]]
        assert set_map(client, vm, 1, 1) == 204
        assert rows_in(store_url, "traces") == 1, "it goes with the next change"


def test_changes_of_many_machines_at_one_time(store_url: str) -> None:
    with serving(store_url) as service:
        vms = [new_vm(service.client) for _ in range(6)]
        statuses: list[int] = []

        def work(vm: str) -> None:
            with ContractClient(base_url=service.url) as client:
                statuses.extend(set_map(client, vm, gfn, gfn + 1) for gfn in range(10))

        threads = [threading.Thread(target=work, args=(vm,)) for vm in vms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [204] * 60
    with serving(store_url) as service:
        assert all(map_of(service.client, vm, gfn) == gfn + 1 for vm in vms for gfn in range(10))


def test_a_commit_that_fails_changes_nothing(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        set_map(client, vm, 1, 0x11)
        before = picture(client, vm)
        run_sql(store_url, *BREAK[kind(store_url)])
        reply = client.put(f"{vm}/subpages?gfn=1&npages=1", json={"access": [0x22]})
        assert reply.status_code == 503 and reply.headers["Retry-After"]
        assert reply.json()["code"] == "store-unavailable" and "nothing was changed" in reply.json()["detail"]
        assert client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0x1000}]}).status_code == 503
        assert client.post("/v1/vms", json={"spp": True}).status_code == 503
        run_sql(store_url, *MEND[kind(store_url)])
        assert picture(client, vm) == before
        assert len(client.get("/v1/vms").json()["vms"]) == 1
        assert set_map(client, vm, 1, 0x33) == 204 and map_of(client, vm, 1) == 0x33
        assert client.get("/readyz").status_code == 200
    with serving(store_url) as service:
        assert map_of(service.client, vm, 1) == 0x33


def test_of_changes_committed_together_only_the_bad_one_fails(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store_url) as service:
        client = service.client
        vms = [new_vm(client) for _ in range(4)]
        number = service.app.state.registry.get(vms[2].rpartition("/")[2]).sequence
        broken = {
            "sqlite": f"CREATE TRIGGER broken BEFORE UPDATE ON vms WHEN NEW.number = {number} "
            "BEGIN SELECT RAISE(ABORT, 'no'); END",
            "postgresql": f"ALTER TABLE vms ADD CONSTRAINT broken CHECK (number <> {number} OR revision < 2) NOT VALID",
        }
        run_sql(store_url, broken[kind(store_url)])
        writer = service.app.state.registry.repository._writer
        statuses: dict[str, int] = {}

        def work(vm: str) -> None:
            with ContractClient(base_url=service.url) as own:
                statuses[vm] = set_map(own, vm, 1, 7)

        threads = [threading.Thread(target=work, args=(vm,)) for vm in vms]
        # The writing thread looks at its lease before each commit, and so finds what was handed in meanwhile at once.
        go_on = threading.Event()
        handed_in: list[object] = []
        submit = writer.submit
        monkeypatch.setattr(writer, "submit", lambda *change: handed_in.append(change) or submit(*change))
        look = writer._lease.check
        monkeypatch.setattr(writer._lease, "check", lambda connection: go_on.wait(60) and look(connection))
        for thread in threads:
            thread.start()
        until(lambda: len(handed_in) == len(vms))
        go_on.set()
        for thread in threads:
            thread.join()
        assert statuses == {vm: 503 if place == 2 else 204 for place, vm in enumerate(vms)}
        assert [map_of(client, vm, 1) for vm in vms] == [7, 7, 0xFFFF_FFFF, 7]


@pytest.mark.parametrize("stored", [True, False])
def test_a_commit_of_which_nobody_knows_whether_it_was_made(
    store_url: str, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer says so, and the machine then is what the store has."""
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        commit = sa.Connection.commit
        failed: list[bool] = []

        def fails_once(connection: sa.Connection) -> None:
            if failed:
                commit(connection)
                return
            failed.append(True)
            if stored:
                commit(connection)
            raise OperationalError("COMMIT", {}, OSError(5, "Input/output error"))

        monkeypatch.setattr(sa.Connection, "commit", fails_once)
        reply = client.put(f"{vm}/subpages?gfn=1&npages=1", json={"access": [0x22]})
        assert reply.status_code == 503 and "not known" in reply.json()["detail"] and failed
        while set_map(client, vm, 2, 0x44) != 204:
            pass
        assert map_of(client, vm, 1) == (0x22 if stored else 0xFFFF_FFFF)
        assert client.get(vm).json()["revision"] == (3 if stored else 2)


def test_a_deletion_of_which_nobody_knows_whether_it_was_made(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        commit = sa.Connection.commit
        failed: list[bool] = []

        def fails_once(connection: sa.Connection) -> None:
            commit(connection)
            if not failed:
                failed.append(True)
                raise OperationalError("COMMIT", {}, OSError(5, "Input/output error"))

        monkeypatch.setattr(sa.Connection, "commit", fails_once)
        assert client.delete(vm).status_code == 503
        while client.get("/readyz").status_code != 200:
            pass
        assert client.get(vm).status_code == 404 and client.get("/v1/vms").json()["vms"] == []


def test_memory_needs_no_store() -> None:
    with running(Settings(warm_up=False, store="memory")) as service:
        assert service.client.get("/readyz").status_code == 200
        assert not service.app.state.registry.repository.durable
