"""Replays over HTTP: every format, every option, every way a body can be wrong."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pyarrow as pa
import pytest

from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.bodies import FORMATS, Body, gpa8, table
from tests.support.http import done, replay, replayed
from tests.support.server import running

# Sub-page 1 of page 2 is protected (0x2080 to 0x20ff), by an object that fills half of it.
GUARDED = {"name": "guarded", "gpa": "0x2080", "size": 64}
MIXED = table(
    gpa=[0x1000, 0x2000, 0x2080, 0x20C0, 0x207C, 0x20FF, 0xFEE00000, 0x2080, 0x2FFC],
    size=[8, 8, 8, 4, 8, 2, 4, 8, 8],
    access=[1, 1, 1, 1, 1, 1, 1, 0, 1],
    gva=[0xFFFF800000000000 + n for n in range(9)],
)
HITS = [2, 3, 4, 5]


@pytest.fixture
def guarded(vm: str, client: ContractClient) -> str:
    client.post(f"{vm}/protections", json={"name": "p", "objects": [GUARDED]})
    return vm


def refused(reply: httpx2.Response, status: int = 422) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree(guarded: str, client: ContractClient, name: str) -> None:
    reply = replay(client, guarded, FORMATS[name](MIXED))
    result = done(reply)
    assert reply.headers["Location"] == f"{guarded}/traces/{result['id']}"
    assert result["records"] == 9 and result["writes"] == 8 and result["violations"] == 4 and result["mmio"] == 1
    assert result["page_granular_violations"] == 6
    assert result["by_object"] == {"guarded": {"violations": 4, "collateral": 2, "first_index": 2, "subpages": 1}}
    assert [record["index"] for record in result["exit_records"]] == HITS
    assert result["stopped_at"] is None and result["next"] is None and result["exit_records_dropped"] == 0
    first = result["exit_records"][0]
    has_gva = name != "packed"
    assert first == {
        "index": 2,
        "vcpu": 0,
        "reason": 48,
        "name": "EPT violation",
        "qualification": first["qualification"],
        "gpa": "0x2080",
        "gva": "0xffff800000000002" if has_gva else None,
        "size": 8,
        "access": 1,
        "gfn": "0x2",
        "subpages": "0x2",
        "denied": "0x2",
        "objects": ["guarded"],
        "resolution": "violation",
        "stale": False,
        "source": 0,
        "insn_len": 0,
    }
    assert client.get(reply.headers["Location"]).json() == result
    tag = client.get(reply.headers["Location"]).headers["ETag"]
    assert client.get(reply.headers["Location"], headers={"If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_trace(guarded: str, client: ContractClient, name: str) -> None:
    if name == "json":
        body = Body(b'{"accesses": []}', bodies.JSON)
    else:
        body = FORMATS[name](MIXED[:0])
    result = replayed(client, guarded, body)
    assert result["records"] == 0 and result["exit_records"] == []


def test_content_types_with_parameters(guarded: str, client: ContractClient) -> None:
    body = bodies.as_json(MIXED)
    for media in ("application/json; charset=utf-8", "Application/JSON"):
        reply = client.post(f"{guarded}/traces", content=body.content, headers={"Content-Type": media})
        assert done(reply)["violations"] == 4


@pytest.mark.parametrize(
    ("on_violation", "records", "violations", "stopped_at", "writable"),
    [
        ("skip", 9, 4, None, "0xfffffffd"),
        ("allow", 9, 4, None, "0xfffffffd"),
        ("grant", 9, 1, None, "0xffffffff"),
        ("stop", 2, 1, 2, "0xfffffffd"),
    ],
)
def test_on_violation(
    guarded: str,
    client: ContractClient,
    on_violation: str,
    records: int,
    violations: int,
    stopped_at: int | None,
    writable: str,
) -> None:
    result = replayed(client, guarded, bodies.arrow(MIXED), f"on_violation={on_violation}")
    assert result["on_violation"] == on_violation
    assert result["records"] == records and result["violations"] == violations and result["stopped_at"] == stopped_at
    assert client.get(f"{guarded}/subpages?gfn=2").json()["access"] == [writable]


def test_stop_and_resume(guarded: str, client: ContractClient) -> None:
    indices: list[int] = []
    start = 0
    while True:
        result = replayed(client, guarded, bodies.ndjson(MIXED), f"on_violation=stop&start={start}")
        indices += [record["index"] for record in result["exit_records"]]
        if result["stopped_at"] is None:
            break
        assert result["stopped_at"] == indices[-1]
        start = result["stopped_at"] + 1
    assert indices == HITS


def test_results_before_and_after_a_stop_add_up(guarded: str, client: ContractClient) -> None:
    """Also where the record that stopped is the first one: naming a start says that the replay goes on."""
    rows = MIXED[HITS[0] :]
    stopped = replayed(client, guarded, bodies.ndjson(rows), "on_violation=stop")
    assert (stopped["stopped_at"], stopped["violations"]) == (0, 1)
    rest = replayed(client, guarded, bodies.ndjson(rows), "start=0")
    assert (rest["records"], rest["violations"], len(rest["exit_records"])) == (len(rows), len(HITS) - 1, len(HITS))
    again = replayed(client, guarded, bodies.ndjson(rows))
    assert again["violations"] == len(HITS), "another run of the trace"


def test_start_keeps_indices(guarded: str, client: ContractClient) -> None:
    result = replayed(client, guarded, bodies.parquet(MIXED), "start=4")
    assert result["records"] == 5 and result["start"] == 4
    assert [record["index"] for record in result["exit_records"]] == [4, 5]
    assert replayed(client, guarded, bodies.packed(MIXED), "start=1000")["records"] == 0


def test_include_all_lists_what_kvm_did(guarded: str, client: ContractClient) -> None:
    result = replayed(client, guarded, bodies.arrow(MIXED), "include=all")
    resolutions = {record["resolution"] for record in result["exit_records"]}
    assert {"violation", "mmio"} < resolutions
    assert len(result["exit_records"]) == sum(result["exits"].values())


def test_carry_and_ignored_columns(guarded: str, client: ContractClient) -> None:
    extra = MIXED.append_column("pc", pa.array(range(9), pa.uint64())).append_column("as_id", pa.array([7] * 9))
    extra = extra.append_column("flags", pa.array([0] * 9))
    for name in ("arrow", "parquet", "json", "ndjson"):
        result = replayed(client, guarded, FORMATS[name](extra), "carry=pc,as_id")
        assert result["ignored_columns"] == ["flags"]
        assert [record["as_id"] for record in result["exit_records"]] == [7] * 4
        assert [record["pc"] for record in result["exit_records"]] == HITS


def test_exit_records_are_bounded_and_totals_are_not(guarded: str, client: ContractClient) -> None:
    result = replayed(client, guarded, bodies.arrow(MIXED), "max_exit_records=3")
    assert len(result["exit_records"]) == 3 and result["exit_records_dropped"] == 1 and result["violations"] == 4
    result = replayed(client, guarded, bodies.arrow(MIXED), "max_exit_records=0")
    assert result["exit_records"] == [] and result["exit_records_dropped"] == 4


def test_addresses_as_text_in_json(guarded: str, client: ContractClient) -> None:
    body = Body(json.dumps({"accesses": [{"gpa": "0x2080"}, {"gpa": "8320", "size": 1}]}).encode(), bodies.JSON)
    assert replayed(client, guarded, body)["violations"] == 2


def test_a_preference_for_later_may_be_ignored(guarded: str, client: ContractClient) -> None:
    body = gpa8([0x2080])
    headers = {**body.headers, "Prefer": "respond-async, wait=1"}
    assert client.post(f"{guarded}/traces?record=gpa8", content=body.content, headers=headers).status_code == 201


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("on_violation=panic", "on_violation"),
        ("on_violations=stop", "on_violations"),
        ("start=-1", "start"),
        ("start=x", "start"),
        ("include=some", "include"),
        ("record=gpa4", "record"),
        ("max_exit_records=10000001", "max_exit_records"),
        ("max_exit_records=-1", "max_exit_records"),
        ("carry=", None),
        ("carry=pc,,as", "carry"),
        ("carry=qualification", "carry"),
        ("carry=gpa", "carry"),
        ("carry=op", "carry"),
        ("carry=missing", "carry"),
        ("record=gpa8", "record"),
    ],
)
def test_refused_options(guarded: str, client: ContractClient, query: str, field: str | None) -> None:
    reply = replay(client, guarded, bodies.arrow(MIXED), query)
    if field is None:
        done(reply)
    else:
        assert refused(reply)["field"] == field


def test_packed_needs_its_layout(guarded: str, client: ContractClient) -> None:
    reply = client.post(f"{guarded}/traces", content=bytes(16), headers={"Content-Type": bodies.PACKED})
    assert refused(reply)["field"] == "record"


def test_unknown_content_type(guarded: str, client: ContractClient) -> None:
    for media in ("text/html", "application/vnd.apache.arrow.file", ""):
        headers = {"Content-Type": media} if media else {}
        reply = client.post(f"{guarded}/traces", content=b"1", headers=headers)
        assert bodies.PARQUET in refused(reply, 415)["rule"] and bodies.ARROW in reply.headers["Accept"]


def with_column(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    if name in MIXED.column_names:
        return MIXED.set_column(MIXED.column_names.index(name), name, pa.array(values, kind))
    return MIXED.append_column(name, pa.array(values, kind))


TAIL = [8] * 6
WRONG: dict[str, tuple[Body, int | None]] = {
    "truncated arrow": (Body(bodies.arrow(MIXED).content[:-40], bodies.ARROW), 0),
    "arrow cut between batches": (Body(bodies.arrow(MIXED, 3).content[:-8], bodies.ARROW), 9),
    "truncated parquet": (Body(bodies.parquet(MIXED).content[:-40], bodies.PARQUET), 0),
    "truncated packed": (Body(bodies.packed(MIXED).content[:-3], bodies.PACKED, "record=record16"), 8),
    "truncated gpa8": (Body(bytes(20), bodies.PACKED, "record=gpa8"), 2),
    "not arrow": (Body(b"nonsense" * 10, bodies.ARROW), 0),
    "nothing as arrow": (Body(b"", bodies.ARROW), 0),
    "nothing as parquet": (Body(b"", bodies.PARQUET), 0),
    "more after arrow": (Body(bodies.arrow(MIXED).content * 2, bodies.ARROW), 9),
    "text for gpa": (bodies.arrow(with_column("gpa", ["x"] * 9)), 0),
    "float for gpa": (bodies.parquet(with_column("gpa", [1.5] * 9)), 0),
    "null gpa": (bodies.arrow(with_column("gpa", [1, 2, None, *TAIL], pa.uint64())), 2),
    "no gpa": (bodies.arrow(MIXED.drop_columns("gpa")), 0),
    "no gpa in parquet": (bodies.parquet(MIXED.drop_columns("gpa")), 0),
    "no gpa in json": (Body(b'{"accesses": [{"gpa": 1}, {"size": 8}]}', bodies.JSON), 1),
    "no gpa in ndjson": (Body(b'{"gpa": 1}\n\n{"size": 8}\n', bodies.NDJSON), 1),
    "size 0": (bodies.arrow(with_column("size", [8, 8, 0, *TAIL], pa.uint16())), 2),
    "size 0 in packed": (bodies.packed(with_column("size", [8, 8, 0, *TAIL], pa.uint16())), 2),
    "size 0 in json": (Body(b'{"accesses": [{"gpa": 1}, {"gpa": 1, "size": 0}]}', bodies.JSON), 1),
    "size too wide": (bodies.arrow(with_column("size", [8, 8, 65536, *TAIL], pa.uint32())), 2),
    "negative size": (bodies.parquet(with_column("size", [8, 8, -1, *TAIL], pa.int32())), 2),
    "past 2^52": (gpa8([0, (1 << 52) - 7]), 1),
    "far past 2^52": (gpa8([0, 1, (1 << 64) - 1]), 2),
    "access 3": (bodies.arrow(with_column("access", [1, 1, 3, *[1] * 6], pa.uint8())), 2),
    "unknown vcpu": (bodies.arrow(with_column("vcpu", [0, 0, 5, *[0] * 6], pa.uint16())), 2),
    "zero byte not zero": (Body(bytes(8) + b"\x08\0\x01\x07\0\0\0\0", bodies.PACKED, "record=record16"), 0),
    "operations without a cache": (Body(b'{"accesses": [{"op": 3, "gva": 4096}]}', bodies.JSON), 0),
    "address spaces without a cache": (bodies.parquet(with_column("address_space", [4096] * 9, pa.uint64())), 0),
    "json without accesses": (Body(b"{}", bodies.JSON), None),
    "json that is a list": (Body(b"[]", bodies.JSON), None),
    "json with another member": (Body(b'{"accesses": [], "more": 1}', bodies.JSON), None),
    "json with a number for a record": (Body(b'{"accesses": [{"gpa": 1}, 3]}', bodies.JSON), 1),
    "json with a float": (Body(b'{"accesses": [{"gpa": 1.5}]}', bodies.JSON), 0),
    "ndjson with text": (Body(b'{"gpa": 1}\n"x"\n', bodies.NDJSON), 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_nothing_of_a_bad_body_is_applied(guarded: str, client: ContractClient, name: str) -> None:
    body, index = WRONG[name]
    before = client.get(f"{guarded}/counters").json(), client.get(guarded).json()
    problem = refused(replay(client, guarded, body, "on_violation=grant"))
    assert problem.get("index") == index, problem
    assert problem["rule"]
    assert (client.get(f"{guarded}/counters").json(), client.get(guarded).json()) == before
    assert client.get(f"{guarded}/traces").json()["traces"] == []


@pytest.mark.parametrize(
    "body",
    [
        Body(b'{"accesses": [', bodies.JSON),
        Body(b"", bodies.JSON),
        Body(b"\xff", bodies.JSON),
        Body(b'{"gpa": 1}\n{"gpa"\n', bodies.NDJSON),
    ],
)
def test_malformed_json(guarded: str, client: ContractClient, body: Body) -> None:
    assert refused(replay(client, guarded, body), 400)["code"] == "malformed-body"


def test_unknown_vm(client: ContractClient) -> None:
    assert refused(replay(client, "/v1/vms/vm_0", gpa8([0])), 404)["field"] == "vm"
    assert client.get("/v1/vms/vm_0/traces").status_code == 404


@pytest.mark.parametrize(("outside", "percent"), [(9, None), (10, 10), (41, 41), (100, 100)])
def test_a_high_share_of_mmio_is_asked_about(
    guarded: str, client: ContractClient, outside: int, percent: int | None
) -> None:
    result = replayed(client, guarded, gpa8([1 << 40] * outside + [0x5000] * (100 - outside)))
    why = "are these virtual addresses (`address=gva`), or is RAM larger than the slots?"
    wanted = [] if percent is None else [f"{percent} % of the writes lie outside every slot; {why}"]
    assert result["mmio"] == outside and result["notes"] == wanted
    assert client.get(f"{guarded}/traces/{result['id']}").json()["notes"] == wanted


def test_notes_of_a_trace_with_reads_are_about_accesses(guarded: str, client: ContractClient) -> None:
    rows = [{"gpa": "0x10000000000", "access": 0}, {"gpa": "0x5000"}]
    result = client.post(f"{guarded}/traces", json={"accesses": rows}).json()
    assert result["notes"][0].startswith("50 % of the accesses lie outside every slot")
    assert client.post(f"{guarded}/traces", json={"accesses": []}).json()["notes"] == []


def test_traces_without_spp(make_vm: Callable[..., str], client: ContractClient) -> None:
    vm = make_vm(spp=False)
    assert replayed(client, vm, gpa8([0, 1 << 30]))["mmio"] == 1


def test_list(guarded: str, client: ContractClient) -> None:
    made = [replayed(client, guarded, gpa8([0x2080] * n))["id"] for n in range(3)]
    seen: list[str] = []
    url = f"{guarded}/traces?limit=2"
    while url:
        page = client.get(url).json()
        seen += [trace["id"] for trace in page["traces"]]
        url = page["next"]
    assert seen == made


@pytest.mark.parametrize(("kept", "records"), [(2, 1000), (100, 5)])
def test_results_are_kept_in_bounds(kept: int, records: int) -> None:
    with running(Settings(warm_up=False, kept_traces=kept, kept_exit_records=records)) as service:
        client = service.client
        slot = {"slot": 0, "gpa": 0, "size": 1 << 20}
        vm = client.post("/v1/vms", json={"spp": True, "memory_slots": [slot]}).headers["Location"]
        client.put(f"{vm}/subpages?gfn=2", json={"access": [0]})
        made = [replay(client, vm, gpa8([0x2080] * 2)).headers["Location"] for _ in range(4)]
        assert [client.get(url).status_code for url in made] == [404, 404, 200, 200]
        many = replay(client, vm, gpa8([0x2080] * 50)).headers["Location"]
        assert client.get(many).status_code == 200


def test_splits_give_the_same_total(guarded: str, client: ContractClient) -> None:
    for cut in range(10):
        parts = [replayed(client, guarded, bodies.arrow(part)) for part in (MIXED[:cut], MIXED[cut:])]
        for total in ("records", "violations", "page_granular_violations", "mmio"):
            assert sum(part[total] for part in parts) == replayed(client, guarded, bodies.arrow(MIXED))[total]


def test_over_the_limit() -> None:
    settings = Settings(warm_up=False, max_body_bytes=1 << 16, spool_memory_bytes=1 << 10, body_queue_bytes=1 << 10)
    with running(settings) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}]}).headers["Location"]
        url = f"{vm}/traces?record=gpa8"

        def pieces(count: int) -> Iterator[bytes]:
            for _ in range(count):
                yield bytes(1000)

        for media, query in ((bodies.PACKED, "?record=gpa8"), (bodies.NDJSON, ""), (bodies.PARQUET, "")):
            headers = {"Content-Type": media}
            assert refused(client.post(f"{vm}/traces{query}", content=bytes(65537), headers=headers), 413)["rule"]
            refused(client.post(f"{vm}/traces{query}", content=pieces(200), headers=headers), 413)
        assert client.get(f"{vm}/counters").json()["counters"]["records"] == 0
        reply = client.post(url, content=pieces(64), headers={"Content-Type": bodies.PACKED})
        assert done(reply)["records"] == 8000


@pytest.mark.parametrize("memory", [0, 10, 1 << 20])
def test_spooled_bodies_larger_than_memory(memory: int) -> None:
    with running(Settings(warm_up=False, spool_memory_bytes=memory)) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}).headers["Location"]
        assert replayed(client, vm, bodies.parquet(MIXED))["records"] == 9
        assert service.app.state.jobs.spools.used == 0


@pytest.mark.parametrize("memory", [0, 10])
def test_a_spooled_body_on_a_full_disk(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is put aside in a file, also if none of it may be in memory; the disk's refusal is not a defect."""
    with running(Settings(warm_up=False, spool_memory_bytes=memory)) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}).headers["Location"]

        def no_room(**_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
        reply = replay(client, vm, bodies.parquet(MIXED))
        assert reply.status_code == 503 and "no space left" in reply.json()["detail"] and reply.headers["Retry-After"]
        assert service.app.state.jobs.spools.used == 0


def test_spooled_bytes_are_bounded() -> None:
    with running(Settings(warm_up=False, max_job_bytes=100)) as service:
        client = service.client
        vm = client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}).headers["Location"]
        problem = refused(replay(client, vm, bodies.parquet(MIXED)), 429)
        assert problem["limit"] == "max_job_bytes"
        assert service.app.state.jobs.spools.used == 0


def test_a_replay_does_not_keep_readers_waiting(guarded: str, client: ContractClient) -> None:
    """While a body trickles in, reads see the state before it, other changes wait, and then everything is there."""
    first, finish = threading.Event(), threading.Event()

    def trickle() -> Iterator[bytes]:
        yield gpa8([0x2080] * 100).content
        first.set()
        finish.wait(30)
        yield gpa8([0x2080] * 100).content

    replies: list[httpx2.Response] = []

    def send() -> None:
        with ContractClient(base_url=client.base_url, timeout=60) as other:
            headers = {"Content-Type": bodies.PACKED}
            replies.append(other.post(f"{guarded}/traces?record=gpa8", content=trickle(), headers=headers))

    def change() -> None:
        with ContractClient(base_url=client.base_url, timeout=60) as other:
            replies.append(other.put(f"{guarded}/subpages?gfn=9", json={"access": [0]}))

    sender = threading.Thread(target=send)
    sender.start()
    assert first.wait(30)
    for _ in range(5):
        assert client.get(f"{guarded}/counters").json()["counters"]["records"] == 0
        assert client.get(f"{guarded}/subpages?gfn=2").status_code == 200
    changer = threading.Thread(target=change)
    changer.start()
    finish.set()
    sender.join()
    changer.join()
    assert sorted(reply.status_code for reply in replies) == [201, 204]
    assert client.get(f"{guarded}/counters").json()["counters"]["records"] == 200
