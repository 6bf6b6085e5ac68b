"""Footprints outlive the process, go with backups, and are never there in part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.problems import StoreUnavailable
from service.runtime import footprints
from service.runtime.stored_repository import StoredRepository
from service.storage import footprint_rows
from service.storage.database import connect
from service.storage.migrate import migrate
from service.storage.records import FootprintRecord
from service.storage.urls import StoreUrl
from tests.faults.kill import wait_until_ready
from tests.faults.nursery import nursery
from tests.support.bodies import packed, table
from tests.support.http import done, key, new_vm
from tests.support.job_calls import ASYNC, ended
from tests.support.stores import command, rows_in, run_sql, section, serving

BODY = packed(table(gpa=[0x1000, 0x1000, 0x2080]))
POLICY = {"name": "p", "objects": [{"name": "o", "gpa": 0x2080, "size": 64}]}
PARQUET = {"Accept": "application/vnd.apache.parquet"}


def made(client: httpx2.Client, query: str = "level=bytes", **headers: str) -> dict[str, Any]:
    url = f"/v1/footprints?{BODY.query}&{query}"
    return done(client.post(url, content=BODY.content, headers=BODY.headers | headers))


def seen(client: httpx2.Client) -> list[Any]:
    """What a client sees of all footprints."""
    found = client.get("/v1/footprints").json()["footprints"]
    paths = [f"/v1/footprints/{item['id']}" for item in found]
    costs = [client.post(f"{path}/costs", json={"policies": [POLICY]}).json() for path in paths]
    return [found, costs, [client.get(path, headers=PARQUET).content for path in paths]]


def beside(client: httpx2.Client, vm: str, query: str = "footprint=spans", **headers: str) -> httpx2.Response:
    url = f"{vm}/traces?{BODY.query}&{query}"
    return client.post(url, content=BODY.content, headers=BODY.headers | headers)


def test_they_are_known_after_a_restart(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        one = made(client)
        result = done(beside(client, vm))
        job = ended(
            client,
            client.post(f"/v1/footprints?{BODY.query}", content=BODY.content, headers=BODY.headers | ASYNC).headers[
                "Location"
            ],
        )
        before = seen(client)
        assert [item["id"] for item in before[0]] == [one["id"], result["footprint"], job["result"].rpartition("/")[2]]
        answered = made(client, **key("again"))
    with serving(store_url) as service:
        client = service.client
        after = seen(client)
        assert made(client, **key("again")) == answered
        assert [part[:3] for part in after] == before and after[0][3]["id"] == answered["id"]
        assert client.get(f"{vm}/traces/{result['id']}/pages").json()["total"] == 2
        assert client.get(f"/v1/jobs/{job['id']}").json()["result"] == job["result"]
        client.delete(vm)
        assert client.get(f"/v1/footprints/{result['footprint']}").status_code == 200, "it is its tenant's"
        assert client.delete(f"/v1/footprints/{one['id']}").status_code == 204
    assert rows_in(store_url, "footprints") == 3 and rows_in(store_url, "footprint_parts") == 3


def test_old_ones_go(store_url: str) -> None:
    with serving(store_url, kept_footprints=2) as service:
        ids = [made(service.client)["id"] for _ in range(3)]
        ids.append(done(beside(service.client, new_vm(service.client)))["footprint"])
        assert [item["id"] for item in service.client.get("/v1/footprints").json()["footprints"]] == ids[2:]
    assert rows_in(store_url, "footprints") == 2 and rows_in(store_url, "footprint_parts") == 2


def test_those_whose_days_are_over_go_when_somebody_looks(store_url: str) -> None:
    with serving(store_url, kept_footprint_days=1e-9) as service:
        ids = [made(service.client)["id"] for _ in range(2)]
        assert rows_in(store_url, "footprints") == 1
        assert service.client.get(f"/v1/footprints/{ids[1]}").status_code == 404
        assert rows_in(store_url, "footprints") == 0
        made(service.client)
        assert service.client.get("/v1/footprints").json()["footprints"] == []
    assert rows_in(store_url, "footprints") == 0 and rows_in(store_url, "footprint_parts") == 0


def test_a_file_is_read_part_by_part(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "PART", 500)
    with serving(store_url) as service:
        client = service.client
        one = made(client)
        parts = -(-one["size"] // 500)
        assert parts > 2 and rows_in(store_url, "footprint_parts") == parts
        content = client.get(f"/v1/footprints/{one['id']}", headers=PARQUET).content
        assert len(content) == one["size"]
        again = done(client.post("/v1/footprints", content=content, headers={"Content-Type": PARQUET["Accept"]}))
        assert again["traces"] == one["traces"] and again["places"] == 2
        costs = client.post(f"/v1/footprints/{one['id']}/costs", json={"policies": [POLICY]})
        assert costs.json()["costs"][0]["violations"] == 1
        # One that goes while it is read ends in the middle, and not as if that were all.
        first, second = store_url, f"part > 0 AND footprint = '{one['id']}'"
        run_sql(first, f"DELETE FROM footprint_parts WHERE {second}")
        with pytest.raises(httpx2.RemoteProtocolError):
            client.get(f"/v1/footprints/{one['id']}", headers=PARQUET)


def test_a_commit_that_fails_leaves_nothing(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        made(client)

        async def fails(self: StoredRepository, *arguments: Any, **more: Any) -> None:
            raise StoreUnavailable("not now; nothing was changed")

        monkeypatch.setattr(StoredRepository, "_store", fails)
        url = f"/v1/footprints?{BODY.query}"
        assert client.post(url, content=BODY.content, headers=BODY.headers).status_code == 503
        assert beside(client, vm).status_code == 503
        listed = client.get("/v1/footprints").json()["footprints"]
        assert client.delete(f"/v1/footprints/{listed[0]['id']}").status_code == 503
        monkeypatch.undo()
        assert client.get("/v1/footprints").json()["footprints"] == listed and len(listed) == 1
        assert client.get(vm).json()["revision"] == 1


def test_kill_keeps_what_was_acknowledged(store_url: str) -> None:
    with nursery() as home:
        server = home.start(store=store_url)
        wait_until_ready(server)
        with httpx2.Client(base_url=server.url, timeout=60.0) as http:
            vm = new_vm(http)
            kept = [made(http)["id"], done(beside(http, vm))["footprint"]]
            before = seen(http)
        server.kill()
        server = home.start(store=store_url)
        wait_until_ready(server)
        with httpx2.Client(base_url=server.url, timeout=60.0) as http:
            assert [item["id"] for item in seen(http)[0]] == kept and seen(http) == before


def test_backups_have_them(store_url: str, tmp_path: Path) -> None:
    with serving(store_url) as service:
        vm, other = new_vm(service.client), new_vm(service.client)
        ids = [made(service.client)["id"], *(done(beside(service.client, url))["footprint"] for url in (vm, other))]
        before = seen(service.client)
        whole, one = tmp_path / "whole.backup", tmp_path / "one.backup"
        assert command("backup", whole, "--store", store_url).exit_code == 0
        assert command("backup", one, "--vm", vm.rpartition("/")[2], "--store", store_url).exit_code == 0
    for file, kept in ((whole, ids), (one, ids[1:2])):
        url = f"sqlite:///{tmp_path}/{file.stem}.db"
        for again in ((), ("--replace",)):
            assert command("restore", file, *again, "--store", url).exit_code == 0
            with serving(url) as service:
                assert [item["id"] for item in service.client.get("/v1/footprints").json()["footprints"]] == kept
                if file is whole:
                    assert seen(service.client) == before
    data = whole.read_bytes()
    cut = data[: data.rindex(b"PAR1")]
    damaged = tmp_path / "damaged.backup"
    damaged.write_bytes(cut)
    assert "is damaged" in command("restore", damaged, "--store", f"sqlite:///{tmp_path}/none.db").output
    body = b'{"machines": 0, "footprints": 1}'
    damaged.write_bytes(data[:12] + section(b"E", body))
    assert "not the footprints" in command("restore", damaged, "--store", f"sqlite:///{tmp_path}/none.db").output


def test_a_footprint_that_cannot_be_read_takes_no_machine_with_it(store_url: str, tmp_path: Path) -> None:
    """Tenants say what is in theirs; checksums of the backup are right."""
    with serving(store_url) as service:
        vm = new_vm(service.client).rpartition("/")[2]
        bad, good = (made(service.client) for _ in range(2))
        file = service.client.get(f"/v1/footprints/{bad['id']}", headers=PARQUET).content
    whole = tmp_path / "whole.backup"
    assert command("backup", whole, "--store", store_url).exit_code == 0
    damaged = file[:40] + bytes(40) + file[80:]
    first, _, rest = whole.read_bytes().partition(section(b"D", file))
    whole.write_bytes(first + section(b"D", damaged) + rest)
    url = f"sqlite:///{tmp_path}/other.db"
    result = command("restore", whole, "--json", "--store", url)
    assert result.exit_code == 0 and json.loads(result.stdout) == {"vms": [vm]}
    assert f"footprint {bad['id']} is left out" in result.stderr and good["id"] not in result.stderr
    with serving(url) as service:
        assert service.client.get(f"/v1/vms/{vm}").status_code == 200
        assert [item["id"] for item in service.client.get("/v1/footprints").json()["footprints"]] == [good["id"]]


def test_another_one_under_the_same_id_is_not_taken_for_it(tmp_path: Path) -> None:
    store, file = f"sqlite:///{tmp_path}/store.db", tmp_path / "one.backup"
    with serving(store) as service:
        made(service.client)
    assert command("backup", file, "--store", store).exit_code == 0
    assert command("restore", file, "--store", store).exit_code == 0, "it has the same"
    run_sql(store, "UPDATE footprints SET size = size + 1")
    assert "is another one" in command("restore", file, "--store", store).output
    run_sql(store, "UPDATE footprints SET size = size - 1, head = replace(head, 'bytes', 'spans')")
    assert "is another one" in command("restore", file, "--store", store).output


def test_more_go_than_a_statement_can_name(tmp_path: Path) -> None:
    """SQLite takes 32,766 parameters in one."""
    ids = [f"fp_{number:016x}" for number in range(40_000)]
    engine = connect(StoreUrl.parse(f"sqlite:///{tmp_path}/store.db"))
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        migrate(connection)
        record = FootprintRecord(ids[-1], "default", "", "2026-11-29T12:00:00.000000Z", 1, "{}", [b"x"])
        footprint_rows.write(connection, [record], ids[:-1])
        assert [found.id for found in footprint_rows.found(connection, ids)] == ids[-1:]
        footprint_rows.write(connection, [], ids)
        assert not footprint_rows.found(connection, ids) and not footprint_rows.parts_of(connection, ids[-1])
    engine.dispose()
