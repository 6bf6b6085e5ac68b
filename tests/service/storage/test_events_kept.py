"""The event log in a store: what was acknowledged is in it after a restart, under the ids that it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.client import ContractClient
from tests.support.event_reader import SSE, following, log, refuse
from tests.support.http import new_vm, set_map
from tests.support.stores import BREAK, MEND, command, kind, rows_in, run_sql, section, serving
from tests.support.waiting import until


def ids(events: list[dict[str, Any]]) -> list[int]:
    return [event["id"] for event in events]


def loaded(service: Any) -> int:
    return sum(entry.loaded is not None for entry in service.app.state.registry.all())


def test_a_reader_goes_on_after_a_restart(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Violations come from the store part by part; neither a page nor a stream needs the machine in memory."""
    for module in ("runtime.traces", "runtime.changes", "runtime.batches", "runtime.trace_records"):
        monkeypatch.setattr(f"service.{module}.PART", 16)
    with serving(store_url, event_heartbeat=0.05) as service:
        vm = new_vm(service.client)
        refuse(service.client, vm, 100)
        refuse(service.client, vm, 100, include="all")
        before = log(service.client, vm, limit=30)
        with following(service.url + vm + "/events") as stream:
            assert stream.take(50) == before[:50] and stream.last == 50
    assert ids(before) == list(range(1, 204))
    with serving(store_url, event_heartbeat=0.05) as service:
        with following(service.url + vm + "/events", {**SSE, "Last-Event-ID": "50"}) as stream:
            assert stream.take(153) == before[50:]
            assert log(service.client, vm, limit=30) == before and not loaded(service)
            set_map(service.client, vm, 9, 9)
            (event,) = stream.take(1)
        assert event["id"] == 204 and event["kind"] == "subpages"
        assert service.client.delete(vm).status_code == 204
    assert rows_in(store_url, "events") == 0


def test_a_log_longer_than_what_stays_in_memory(store_url: str) -> None:
    with serving(store_url, kept_events=80, event_heartbeat=0.05) as service:
        client = service.client
        vm = new_vm(client)
        with following(service.url + vm + "/events") as stream:
            for gfn in range(70):
                set_map(client, vm, gfn, 0)
            assert ids(stream.take(71)) == list(range(1, 72))
        assert ids(log(client, vm, limit=16)) == list(range(1, 72))
        for gfn in range(40):
            set_map(client, vm, gfn, 1)
        events = log(client, vm)
        assert events[0]["kind"] == "dropped" and events[0]["detail"]["first"] == 1
        # Pruned some rows at a time: never fewer than are to be kept, and hardly more.
        assert 80 <= len(events) - 1 <= 85 and ids(events) == list(range(112 - len(events), 112))
        assert events[0]["detail"]["count"] == events[0]["id"] == 112 - len(events)
    assert rows_in(store_url, "events") == len(events) - 1


def test_violations_of_a_trace_that_the_store_dropped(store_url: str) -> None:
    with serving(store_url, kept_traces=1, loaded_exit_records=0) as service:
        vm = new_vm(service.client)
        for _ in range(2):
            refuse(service.client, vm, 5)
    with serving(store_url, kept_traces=1) as service:
        events = log(service.client, vm, kinds="violation")
        gone = {"first": 3, "last": 7, "count": 5, "reason": "trace-not-kept"}
        assert ids(events) == [7, *range(9, 14)] and events[0]["detail"] == gone
        assert log(service.client, vm, kinds="violation")[1:] == events[1:]


def test_retention_by_age(store_url: str) -> None:
    with serving(store_url) as service:
        vm = new_vm(service.client)
        for gfn in range(9):
            set_map(service.client, vm, gfn, 0)
    run_sql(store_url, "UPDATE events SET created = '2001-01-01T00:00:00.000000Z' WHERE first <= 6")
    with serving(store_url, kept_event_days=1) as service:
        events = log(service.client, vm)
        assert ids(events) == [6, 7, 8, 9, 10]
        assert events[0]["detail"] == {"first": 1, "last": 6, "count": 6, "reason": "not-kept"}
        assert rows_in(store_url, "events") == 10, "they go with the next change"
        set_map(service.client, vm, 0, 1)
        assert rows_in(store_url, "events") == 5
    run_sql(store_url, "UPDATE events SET created = '2001-01-01T00:00:00.000000Z'")
    with serving(store_url, kept_event_days=1) as service:
        assert log(service.client, vm)[0]["detail"] == {"first": 1, "last": 11, "count": 11, "reason": "not-kept"}
        set_map(service.client, vm, 0, 2)
        assert ids(log(service.client, vm)) == [11, 12], "no id is given twice, even when no event is left"


def test_what_is_not_stored_is_not_told(store_url: str) -> None:
    with serving(store_url, event_heartbeat=0.05) as service:
        client = service.client
        vm = new_vm(client)
        with following(service.url + vm + "/events", after="latest") as stream:
            run_sql(store_url, *BREAK[kind(store_url)])
            assert set_map(client, vm, 1, 0) == 503
            assert ids(log(client, vm)) == [1]
            run_sql(store_url, *MEND[kind(store_url)])
            until(lambda: set_map(client, vm, 1, 0) == 204)
            (event,) = stream.take(1)
        assert (event["id"], event["kind"]) == (2, "subpages") and ids(log(client, vm)) == [1, 2]


def test_a_stream_ends_when_another_takes_the_store(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/subpage.db"
    with serving(url, event_heartbeat=0.05) as service:
        vm = new_vm(service.client)
        with following(service.url + vm + "/events") as stream:
            stream.take(1)
            run_sql(url, "UPDATE owner SET epoch = epoch + 1")
            assert set_map(service.client, vm, 1, 0) == 503
            (end,) = stream
            assert end["detail"] == {"reason": "store-lost"}


def test_a_store_that_cannot_be_read_ends_a_stream(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/subpage.db"
    with serving(url) as service:
        vm = new_vm(service.client)
    with serving(url, event_heartbeat=0.05) as service:
        run_sql(url, "ALTER TABLE events RENAME TO elsewhere")
        with following(service.url + vm + "/events") as stream:
            (end,) = stream
        assert end["detail"] == {"reason": "store-unavailable"}
        assert service.client.get(f"{vm}/events").status_code == 503
        run_sql(url, "ALTER TABLE elsewhere RENAME TO events")
        assert ids(log(service.client, vm)) == [1]


def told(client: ContractClient, vm: str) -> list[tuple[int, str]]:
    return [(event["id"], event["detail"].get("change", event["kind"])) for event in log(client, vm)]


def test_backups_carry_the_log(store_url: str, tmp_path: Path) -> None:
    first = f"sqlite:///{tmp_path}/first.db"
    file = tmp_path / "log.backup"
    with serving(first) as service:
        vm = new_vm(service.client)
        refuse(service.client, vm, 5)
        before = log(service.client, vm)
    assert command("backup", file, "--store", first).exit_code == 0
    assert command("restore", file, "--store", store_url).exit_code == 0
    with serving(store_url) as service:
        after = log(service.client, vm)
        assert after[:-1] == before and ids(after) == list(range(1, 9))
        assert (after[-1]["kind"], after[-1]["detail"]) == ("lifecycle", {"change": "restored"})
        for gfn in range(3):
            set_map(service.client, vm, gfn, 0)
    assert command("restore", file, "--replace", "--store", store_url).exit_code == 0
    with serving(store_url) as service:
        # Readers of the log that was replaced are told that it does not go on, under ids that it never had.
        events = log(service.client, vm, after=7)
        assert events[0]["detail"] == {"first": 8, "last": 11, "count": 4, "reason": "not-kept"}
        assert (events[1]["id"], events[1]["detail"]) == (12, {"change": "restored"}) and len(events) == 2


def test_a_backup_of_the_release_before_has_no_log(tmp_path: Path) -> None:
    first, second = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second"))
    file = tmp_path / "old.backup"
    with serving(first) as service:
        vm = new_vm(service.client)
    assert command("backup", file, "--store", first).exit_code == 0
    content = file.read_bytes()
    start, log_at, end = content[:8], content.index(b"L", content.rindex(b"B")), content.rindex(b"E")
    while section(b"L", content[log_at + 5 : end - 4]) != content[log_at:end]:
        log_at = content.index(b"L", log_at + 1)
    file.write_bytes(start + (1).to_bytes(4, "little") + content[12:log_at] + content[end:])
    assert command("restore", file, "--store", second).exit_code == 0
    with serving(second) as service:
        assert told(service.client, vm)[-1] == (2, "restored")
