"""One process owns a store; a second one waits; whoever loses the store stops writing at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import typer.testing

from service.cli.app import app
from service.problems import StoreUnavailable
from service.storage.schema import REVISION
from tests.support.http import map_of, new_vm, set_map
from tests.support.postgres import Cluster
from tests.support.server import Running
from tests.support.stores import run_sql, serving
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]


def ready(service: Running) -> bool:
    return service.client.get("/readyz").status_code == 200


def test_a_second_process_waits_unready(store_url: str) -> None:
    with contextlib.ExitStack() as stack:
        first_only = stack.enter_context(contextlib.ExitStack())
        first = first_only.enter_context(serving(store_url))
        vm = new_vm(first.client)
        second = stack.enter_context(serving(store_url, ready=False))
        until(lambda: "another process owns" in second.client.get("/readyz").json()["detail"])
        assert second.client.get("/livez").status_code == 200
        for reply in (second.client.get(vm), second.client.post("/v1/vms", json={}), second.client.get("/v1/vms")):
            assert reply.status_code == 503 and reply.json()["code"] == "not-ready" and reply.headers["Retry-After"]
        assert set_map(first.client, vm, 1, 0x11) == 204 and ready(first)
        first_only.close()
        until(lambda: ready(second))
        assert map_of(second.client, vm, 1) == 0x11
        assert set_map(second.client, vm, 1, 0x22) == 204


def take_away(url: str, postgres: Cluster | None) -> None:
    """What makes the owner's lock worthless, without the owner's knowing."""
    if postgres is None:
        Path(url.removeprefix("sqlite:///") + ".lock").unlink()
    else:
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")


def test_losing_the_store_stops_writes_at_once(
    store_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock goes, another process takes over: the first writes nothing, and follows when the store is free again."""
    postgres = request.getfixturevalue("postgres") if store_url.startswith("postgresql") else None
    with serving(store_url) as first:
        vm = new_vm(first.client)
        set_map(first.client, vm, 1, 0x11)
        with contextlib.ExitStack() as stack:
            # The first must not come back between the loss and the second's taking over.
            monkeypatch.setattr(first.app.state.registry.repository._writer, "_pause", lambda seconds: time.sleep(0.5))
            second = stack.enter_context(serving(store_url, ready=False))
            take_away(store_url, postgres)
            until(lambda: ready(second))
            assert set_map(first.client, vm, 1, 0x22) == 503
            assert set_map(second.client, vm, 1, 0x33) == 204
            assert not ready(first)
            # As soon as it sees that there is another, what it has in memory is no longer true.
            until(lambda: first.client.get(vm).status_code == 503)
            assert set_map(first.client, vm, 1, 0x44) == 503
            assert map_of(second.client, vm, 1) == 0x33
        until(lambda: ready(first))
        assert map_of(first.client, vm, 1) == 0x33
        assert set_map(first.client, vm, 1, 0x55) == 204


def test_an_owner_that_was_followed_writes_nothing_though_its_lock_looks_fine(store_url: str) -> None:
    """The epoch proves ownership: as if another had come, written and gone while this process was stopped."""
    with serving(store_url) as service:
        vm = new_vm(service.client)
        run_sql(store_url, "UPDATE owner SET epoch = epoch + 1", "UPDATE vms SET revision = 9")
        assert set_map(service.client, vm, 1, 0x22) == 503
        until(lambda: ready(service))
        assert service.client.get(vm).json()["revision"] == 9
        assert map_of(service.client, vm, 1) == 0xFFFF_FFFF


def test_a_machine_that_somebody_else_changed_is_read_again(store_url: str) -> None:
    with serving(store_url) as service:
        vm = new_vm(service.client)
        run_sql(store_url, "UPDATE vms SET revision = 9")
        assert set_map(service.client, vm, 1, 0x22) == 503
        until(lambda: ready(service))
        assert service.client.get(vm).json()["revision"] == 9


def test_the_connection_breaks_and_comes_back(postgres: Cluster) -> None:
    """Reads go on meanwhile; the machines in memory are still the store's."""
    postgres.sql("CREATE DATABASE interrupted", database="postgres")
    url = postgres.url.rpartition("/")[0] + "/interrupted"
    with serving(url) as service:
        vm = new_vm(service.client)
        set_map(service.client, vm, 1, 0x11)
        loaded = service.app.state.registry.get(vm.rpartition("/")[2]).loaded
        take_away(url, postgres)
        assert set_map(service.client, vm, 1, 0x22) == 503
        assert map_of(service.client, vm, 1) == 0x11
        until(lambda: ready(service))
        assert service.app.state.registry.get(vm.rpartition("/")[2]).loaded is loaded
        assert set_map(service.client, vm, 1, 0x33) == 204


def test_a_store_of_a_later_release_is_left_alone(store_url: str) -> None:
    with serving(store_url) as service:
        new_vm(service.client)
    run_sql(store_url, "UPDATE alembic_version SET version_num = '9999'")
    with serving(store_url, ready=False) as service:
        until(lambda: "9999" in service.client.get("/readyz").json()["detail"])
    run_sql(store_url, f"UPDATE alembic_version SET version_num = '{REVISION}'")
    with serving(store_url) as service:
        assert len(service.client.get("/v1/vms").json()["vms"]) == 1


def test_a_store_that_cannot_be_reached_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "not a folder"
    folder.write_text("")
    with serving(f"sqlite:///{folder}/subpage.db", ready=False) as service:
        until(lambda: service.app.state.registry.repository.trouble not in ("", "the store is being opened"))
        assert service.client.get("/readyz").status_code == 503
        folder.unlink()
        until(lambda: ready(service))


def test_more_workers_are_refused_with_the_reason() -> None:
    result = typer.testing.CliRunner().invoke(app, ["serve", "--workers", "2"])
    assert result.exit_code == 2 and "One process owns a store" in result.output


def test_a_bad_store_is_refused_with_the_rule() -> None:
    result = typer.testing.CliRunner().invoke(app, ["serve", "--store", "mysql://host/db"])
    assert result.exit_code == 2 and "SUBPAGE_STORE" in result.output and "postgresql://" in result.output


@contextlib.contextmanager
def process(url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--store", url]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "SUBPAGE_WARM_UP": "false"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert started.stdout is not None
    try:
        found = re.search(r"(http://\S+)", started.stdout.readline())
        assert found is not None
        yield started, found[1]
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def test_two_processes(tmp_path: Path) -> None:
    """The second takes over the moment the first is killed."""
    url = f"sqlite:///{tmp_path}/subpage.db"
    with process(url) as (first, at_first), httpx2.Client(timeout=30.0) as client:
        until(lambda: client.get(f"{at_first}/readyz").status_code == 200)
        vm = client.post(f"{at_first}/v1/vms", json={"spp": True}).headers["Location"]
        with process(url) as (second, at_second):
            until(lambda: "another process" in client.get(f"{at_second}/readyz").text)
            first.kill()
            until(lambda: client.get(f"{at_second}/readyz").status_code == 200)
            assert client.get(at_second + vm).status_code == 200
            second.send_signal(signal.SIGTERM)
            assert second.wait() == 0


def test_a_change_under_way_when_the_store_is_lost(store_url: str) -> None:
    """Its machine is another's now: 503, not 404, and nothing of it is stored."""
    with serving(store_url) as service:
        vm = new_vm(service.client)
        registry = service.app.state.registry
        entry = registry.get(vm.rpartition("/")[2])

        async def change() -> None:
            async with entry.mutation(hooks=()) as change:
                change.machine.write_memory(0, b"x")
                registry.leave()

        with pytest.raises(StoreUnavailable, match="taken the store over"):
            asyncio.run(change())
    with serving(store_url) as service:
        assert service.client.get(vm).json()["revision"] == 1
