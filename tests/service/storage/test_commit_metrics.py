"""What the metrics tell of a store."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.storage.meter import Meter, Transaction, nobody
from service.storage.records import Change, TraceRecord, VmRecord
from tests.contract.client import ContractClient
from tests.support.http import OCTETS, new_vm, set_map
from tests.support.stores import run_sql, serving
from tests.support.waiting import until

DOCUMENT = Path(__file__).parents[3] / "docs" / "operations-security.md"


def value(client: ContractClient, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == f"subpage_store_{name}")


def test_commits_are_counted_and_measured(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        assert value(client, "commit_seconds_count") == value(client, "written_bytes_total") == 0
        vm = new_vm(client)
        made = value(client, "written_bytes_total")
        assert value(client, "commit_seconds_count") == value(client, "commit_changes_sum") == 1
        assert made > 4096 and value(client, "commit_seconds_sum") > 0
        assert set_map(client, vm, 1, 0) == 204
        small = value(client, "written_bytes_total") - made
        assert small >= 4096
        content = b"\x55" * (16 << 12)
        client.put(f"{vm}/memory", params={"gpa": 0, "size": len(content)}, content=content, headers=OCTETS)
        assert value(client, "written_bytes_total") - made - small >= len(content)
        before = value(client, "written_bytes_total")
        body = struct.pack("<1000Q", *[0x1000] * 1000)
        assert client.post(f"{vm}/traces?record=gpa8", content=body, headers=OCTETS).json()["violations"] == 1000
        assert value(client, "written_bytes_total") - before > 1000 * 8, "a thousand exit records, and the machine"
        assert value(client, "commit_changes_sum") == 4 and value(client, "failures_total") == 0
        client.get(vm)
        assert value(client, "commit_seconds_count") == 4, "reads commit nothing"


def test_groups_are_counted_by_their_changes(store_url: str) -> None:
    """Changes that arrive together may share a transaction; each is counted once."""
    with serving(store_url) as service:
        vms = [new_vm(service.client) for _ in range(8)]
        before = value(service.client, "commit_changes_sum")
        with ThreadPoolExecutor(8) as threads, ContractClient(base_url=service.url, timeout=60.0) as client:
            done = list(threads.map(lambda n: set_map(client, vms[n % 8], 1, n), range(40)))
        assert done == [204] * 40
        assert value(service.client, "commit_changes_sum") - before == 40
        assert value(service.client, "commit_seconds_count") <= before + 40


def test_what_is_not_stored_is_a_failure(store_url: str) -> None:
    with serving(store_url) as service:
        client = service.client
        vm = new_vm(client)
        before = value(client, "commit_seconds_count")
        run_sql(store_url, "ALTER TABLE blocks RENAME TO hidden")
        assert set_map(client, vm, 1, 0) == 503
        assert value(client, "failures_total") == 1 and value(client, "commit_seconds_count") == before
        run_sql(store_url, "ALTER TABLE hidden RENAME TO blocks")
        until(lambda: set_map(client, vm, 1, 0) == 204)
        assert value(client, "commit_seconds_count") == before + 1


def test_a_change_is_counted_as_often_as_it_is_written() -> None:
    """One that has to be written anew, alone, is a transaction of its own; what was counted before is not kept."""
    record = VmRecord(1, "vm_1", "", 2)
    trace = TraceRecord("tr_1", 1, "", 1, "{}", b"12", (b"345", b"6789"))
    change = Change(1, 1, record, lambda: "head", lambda: iter([("ept", 1, bytes(4096)), ("free", 2, b"")]), [trace])
    for _ in range(2):
        meter = Meter(1)
        metered = meter.metered(change)
        assert metered.head() == "head" and [kind for kind, _, _ in metered.blocks()] == ["ept", "free"]
        told = meter.ended(stored=True)
        assert (told.changes, told.octets, told.stored) == (1, 4 + 4096 + 2 + 2 + 3 + 4, True) and told.seconds >= 0
    nobody(Transaction(1, 1, 0.0, stored=True))


def test_every_metric_is_documented(store_url: str) -> None:
    with serving(store_url) as service:
        families = text_string_to_metric_families(service.client.get("/metrics").text)
        names = {family.name.removesuffix("_created") for family in families}
    documented = DOCUMENT.read_text(encoding="utf-8")
    missing = {name for name in names if name.startswith("subpage_") and f"`{name}" not in documented}
    assert not missing
