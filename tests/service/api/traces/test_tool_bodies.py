"""Bodies that tools wrote, over HTTP: how they are told apart, what is said of them, what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.contract.client import ContractClient
from tests.support.http import done

SAMPLES = Path(__file__).parents[3] / "data" / "tools"
LACKEY = b"==4242== Lackey, an example Valgrind tool\nI  00001000,4\n S 00002080,8\n L 00002080,8\n M 00003000,4\n"
TEXT = {"content-type": "text/plain"}


@pytest.fixture
def guarded(vm: str, client: ContractClient) -> str:
    client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "guarded", "gpa": "0x2080", "size": 64}]})
    return vm


@pytest.mark.parametrize("query", ["", "?format=auto", "?format=lackey"])
@pytest.mark.parametrize("media", ["text/plain", "text/csv", "text/plain; charset=utf-8"])
def test_text_of_a_tool(guarded: str, client: ContractClient, query: str, media: str) -> None:
    result = done(client.post(f"{guarded}/traces{query}", content=LACKEY, headers={"content-type": media}))
    assert (result["records"], result["writes"], result["violations"]) == (4, 2, 1)
    assert (result["format"], result["addresses"], result["sizes"]) == ("lackey", "process-virtual", "as recorded")
    assert result["skipped"] == {
        "lines": 1,
        "reasons": {"message of Valgrind": 1},
        "first": [{"line": 1, "reason": "message of Valgrind", "text": "==4242== Lackey, an example Valgrind tool"}],
    }
    assert [(record["index"], record["pc"]) for record in result["exit_records"]] == [(1, 0x1000)]
    again = client.get(f"{guarded}/traces/{result['id']}").json()
    assert again["skipped"] == result["skipped"] and again["format"] == "lackey"


def test_a_body_of_octets_whose_format_is_named(guarded: str, client: ContractClient) -> None:
    octets = {"content-type": "application/octet-stream"}
    assert done(client.post(f"{guarded}/traces?format=lackey", content=LACKEY, headers=octets))["violations"] == 1


def test_bodies_of_no_tool_say_their_format(guarded: str, client: ContractClient) -> None:
    result = done(client.post(f"{guarded}/traces", json={"accesses": [{"gpa": "0x2080"}]}))
    assert result["format"] == "json"
    assert result["addresses"] is result["sizes"] is result["skipped"] is None


def test_lines_of_no_form(guarded: str, client: ContractClient) -> None:
    body = LACKEY + b"hello\n"
    reply = client.post(f"{guarded}/traces", content=body, headers=TEXT)
    assert reply.status_code == 422
    problem = reply.json()
    assert "line 6: the line is none of lackey" in problem["detail"]
    assert client.get(f"{guarded}/traces").json()["traces"] == []
    result = done(client.post(f"{guarded}/traces?skip_unknown=true", content=body, headers=TEXT))
    assert result["skipped"]["reasons"] == {"message of Valgrind": 1, "line of no known form": 1}


@pytest.mark.parametrize(
    ("query", "media", "field"),
    [
        ("?format=nonsense", "text/plain", "format"),
        ("?format=lackey", "application/json", "format"),
        ("?format=lackey", "application/vnd.apache.parquet", "format"),
        ("?format=lackey&record=gpa8", "application/octet-stream", "record"),
        ("?skip_unknown=perhaps", "text/plain", "skip_unknown"),
    ],
)
def test_what_does_not_go_together(guarded: str, client: ContractClient, query: str, media: str, field: str) -> None:
    reply = client.post(f"{guarded}/traces{query}", content=LACKEY, headers={"content-type": media})
    assert reply.status_code == 422, reply.text
    assert field in reply.json()["field"]


def test_text_of_no_tool(guarded: str, client: ContractClient) -> None:
    reply = client.post(f"{guarded}/traces", content=b"nothing of this kind\n", headers=TEXT)
    assert reply.status_code == 422 and "name one with format, of lackey" in reply.json()["detail"]


def test_an_async_replay_of_text(guarded: str, client: ContractClient) -> None:
    reply = client.post(f"{guarded}/traces", content=LACKEY, headers=TEXT | {"Prefer": "wait=20"})
    assert done(reply)["skipped"]["lines"] == 1


def test_pc_and_time_in_exit_records(guarded: str, client: ContractClient) -> None:
    accesses = [{"gpa": 4096, "pc": 1, "time": 2}, {"gpa": "0x2080", "pc": "0xffffffff81000000", "time": 1 << 60}]
    for carry in ("", "?carry=pc,time"):
        result = done(client.post(f"{guarded}/traces{carry}", json={"accesses": accesses}))
        assert result["ignored_columns"] == []
        (record,) = result["exit_records"]
        assert (record["pc"], record["time"]) == ("0xffffffff81000000", hex(1 << 60))


OCTETS = {"content-type": "application/octet-stream"}


def test_a_table(guarded: str, client: ContractClient) -> None:
    body = b"addr,len,t\n0x1000,8,5\n0x2080,4,6\n"
    reply = client.post(
        f"{guarded}/traces?columns=gpa%3Daddr,size%3Dlen,time%3Dt", content=body, headers={"content-type": "text/csv"}
    )
    result = done(reply)
    assert (result["format"], result["records"], result["violations"], result["ignored_columns"]) == ("csv", 2, 1, [])
    assert result["exit_records"][0]["time"] == 6 and result["exit_records"][0]["size"] == 4
    problem = client.post(f"{guarded}/traces?columns=gpa", content=body, headers={"content-type": "text/csv"})
    assert problem.status_code == 422 and problem.json()["field"] == "columns"


def test_champsim(guarded: str, client: ContractClient) -> None:
    body = (SAMPLES / "champsim.trace").read_bytes()
    result = done(client.post(f"{guarded}/traces?format=champsim", content=body, headers=OCTETS))
    assert (result["format"], result["records"], result["sizes"]) == ("champsim", 50, "assumed: 8 bytes")
    reply = client.post(f"{guarded}/traces?record=gpa8", content=body, headers=OCTETS)
    assert reply.status_code == 422 and "looks like a champsim trace" in reply.json()["detail"]


@pytest.mark.parametrize("media", ["application/json", "application/x-ndjson", "application/vnd.apache.parquet"])
def test_text_of_a_tool_sent_as_something_else(guarded: str, client: ContractClient, media: str) -> None:
    reply = client.post(f"{guarded}/traces", content=LACKEY, headers={"content-type": media})
    assert reply.status_code in (400, 422)
    assert "this looks like a lackey trace: send it as text/plain" in reply.json()["detail"]


def test_a_compressed_file(guarded: str, client: ContractClient) -> None:
    result = done(client.post(f"{guarded}/traces", content=gzip.compress(LACKEY), headers=TEXT))
    assert result["violations"] == 1 and result["skipped"]["lines"] == 1
    reply = client.post(f"{guarded}/traces", content=gzip.compress(LACKEY)[:-9], headers=TEXT)
    assert reply.status_code in (400, 422) and "must be a complete gzip stream" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("sample", "format", "addresses", "records", "writes"),
    [
        ("bochs-trace-mem.txt", "bochs", "guest-physical", 12, 12),
        ("qemu-system-execlog.txt", "execlog", "guest-physical", 13, 12),
        ("ftrace-kvm_mmio.txt", "ftrace", "guest-physical", 3, 2),
        ("ftrace-kvm_exit-kvm_page_fault.txt", "ftrace", "guest-physical", 7, 5),
        ("gem5-debug.txt", "gem5", "guest-physical", 40, 40),
        ("drmemtrace-view.txt", "drmemtrace", "process-virtual", 80, 40),
        ("perf-script-page-faults.txt", "perf-script", "process-virtual", 30, 22),
    ],
)
def test_the_samples(
    guarded: str, client: ContractClient, sample: str, format: str, addresses: str, records: int, writes: int
) -> None:
    result = done(client.post(f"{guarded}/traces", content=(SAMPLES / sample).read_bytes(), headers=TEXT))
    assert (result["format"], result["addresses"]) == (format, addresses)
    assert (result["records"], result["writes"]) == (records, writes)


def test_a_system_map_says_what_it_is_for(guarded: str, client: ContractClient) -> None:
    body = b"ffffffff81000000 T _text\nffffffff81000110 t startup_64\n"
    reply = client.post(f"{guarded}/traces", content=body, headers=TEXT)
    assert reply.status_code == 422 and "`subpage policy from-symbols FILE --object NAME`" in reply.json()["detail"]


def test_what_was_written_goes_along_when_asked_for(vm: str, client: ContractClient) -> None:
    client.post(f"{vm}/protections", json={"name": "p", "objects": [{"name": "byte", "gpa": "0x4080", "size": 1}]})
    body = (SAMPLES / "bochs-trace-mem.txt").read_bytes()
    result = done(client.post(f"{vm}/traces?carry=value", content=body, headers=TEXT))
    assert [record["value"] for record in result["exit_records"]] == [0x5A]
