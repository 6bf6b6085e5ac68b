"""Footprints of files that the operator lets clients name: those of ``subpage footprint build``, and of no others."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
import zstandard
from typer.testing import CliRunner

from service.cli.app import app
from service.runtime import source_builds
from service.security.tokens import MemoryTokens, TokenStore, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.scale.traces import write
from tests.support.http import key
from tests.support.job_calls import ASYNC, ended
from tests.support.server import Running, running
from tests.support.waiting import until

PARQUET = "application/vnd.apache.parquet"
WAIT = {"Prefer": "wait=120"}
Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Services with settings of their own."""
    contexts = []

    def begin(tokens: TokenStore | None = None, **settings: Any) -> Running:
        contexts.append(running(Settings(warm_up=False, store="memory", **settings), tokens))
        return contexts[-1].__enter__()

    yield begin
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place, beside one that is not listed."""
    for name in ("traces", "secret"):
        (tmp_path / name / "deep").mkdir(parents=True)
        write(tmp_path / name / "a.parquet", 1)
        write(tmp_path / name / "deep" / "b.parquet", 2, groups=3)
    (tmp_path / "traces" / "c.csv.gz").write_bytes(gzip.compress(b"gpa,size\n" + b"4096,8\n" * 999))
    return tmp_path / "traces"


def build(client: httpx2.Client, *sources: object, **members: Any) -> httpx2.Response:
    headers = members.pop("headers", WAIT)
    return client.post("/v1/footprints:build", json={"sources": list(map(str, sources)), **members}, headers=headers)


def file_of(client: httpx2.Client, reply: httpx2.Response) -> bytes:
    assert reply.status_code == 201, reply.text
    assert reply.headers["Location"] == f"/v1/footprints/{reply.json()['id']}"
    return client.get(reply.headers["Location"], headers={"Accept": PARQUET}).content


def refused(reply: httpx2.Response, status: int, field: str | None, rule: str) -> None:
    problem = reply.json()
    assert (reply.status_code, problem.get("field")) == (status, field), problem
    assert rule in problem["rule"], problem


@pytest.mark.parametrize(
    "options", [(), ("--level", "bytes", "--by", "time:1us", "--by", "pc")], ids=["spans", "bytes"]
)
def test_it_is_what_the_command_line_makes(
    start: Start, folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    client = start(footprint_sources=(str(folder),)).client
    sources = [f"{folder}/**"] if not options else [f"{folder}/deep/*", f"{folder}/a.parquet"]
    output = tmp_path / "f"
    given = ["footprint", "build", *sources, "-o", str(output), *options]
    assert CliRunner().invoke(app, given).exit_code == 0
    members = {"level": "bytes", "by": "time:1000,pc"} if options else {}
    assert file_of(client, build(client, *sources, **members)) == output.read_bytes()


def test_a_job_tells_how_far_it_is(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(footprint_sources=(str(folder),)).client
    gate, real = threading.Event(), source_builds.reduced

    def held(wanted: Any, source: Any, *others: Any) -> Any:
        if source.name.endswith("b.parquet"):
            assert gate.wait(60)
        return real(wanted, source, *others)

    monkeypatch.setattr(source_builds, "reduced", held)
    reply = build(client, f"{folder}/a.parquet", f"{folder}/deep/b.parquet", headers={})
    assert reply.status_code == 202 and "Preference-Applied" not in reply.headers
    url = reply.headers["Location"]
    until(lambda: client.get(url).json()["records_done"] == 3000)
    job = client.get(url).json()
    size = [(folder / name).stat().st_size for name in ("a.parquet", "deep/b.parquet")]
    assert job["progress"] == pytest.approx(size[0] / sum(size), abs=1e-3) and job["eta"] > 0 and job["vm"] is None
    gate.set()
    job = ended(client, url)
    assert (job["state"], job["records_done"], job["progress"]) == ("succeeded", 6000, 1.0)
    assert client.get(job["result"]).json()["records"] == 6000


def test_a_job_is_cancelled(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(footprint_sources=(str(folder),)).client
    begun, real = threading.Event(), source_builds.reduced

    def held(wanted: Any, source: Any, files: Any, *others: Any) -> Any:
        begun.set()
        while True:  # as a reader does between two pieces
            files._check()
            time.sleep(0.005)
        return real(wanted, source, files, *others)

    monkeypatch.setattr(source_builds, "reduced", held)
    url = build(client, f"{folder}/*.parquet", headers=ASYNC).headers["Location"]
    assert begun.wait(60)
    job = client.post(f"{url}:cancel").json()
    assert (job["state"], job["result"], job["progress"]) == ("cancelled", None, None)
    assert client.get("/v1/footprints").json()["footprints"] == []


def test_a_request_that_is_sent_again_is_answered_as_before(start: Start, folder: Path) -> None:
    client = start(footprint_sources=(str(folder),)).client
    replies = [build(client, f"{folder}/a.parquet", headers=WAIT | key("once")) for _ in range(2)]
    assert replies[0].content == replies[1].content
    assert len(client.get("/v1/footprints").json()["footprints"]) == 1


def links(folder: Path) -> None:
    """Ways out, and things that are no files."""
    secret = folder.parent / "secret"
    (folder / "out.parquet").symlink_to(secret / "a.parquet")
    (folder / "out").symlink_to(secret)
    (folder / "out2").symlink_to("../secret")
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "round").symlink_to(folder / "round")
    (folder / "environ").symlink_to("/proc/self/environ")
    (folder / "null").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("out.parquet", "must not lead out of"),
        ("out/a.parquet", "must not lead out of"),
        ("out2/deep/b.parquet", "must not lead out of"),
        ("out/*", "must not lead out of"),
        ("out*", "must not lead out of the places that the operator lists (SUBPAGE_FOOTPRINT_SOURCES): "),
        ("**", "must not lead out of"),
        ("environ", "must not lead out of"),
        ("null", "must not lead out of"),
        ("fifo", "must be a file"),
        ("deep", "must be a file"),
        ("dangling", "must exist"),
        ("round", "must exist"),
        ("nothing", "must exist"),
        ("a.parquet/b", "must exist: Not a directory"),
        ("nothing/*", "must be in a folder that there is"),
        ("a.parquet/*", "must be in a folder that there is"),
        ("x*", "matches no file"),
        ("fif?", "must have no ?"),
        ("fif[o]", "matches no file"),
        ("../secret/a.parquet", "empty, . or .."),
    ],
)
def test_what_leads_out_is_refused(start: Start, folder: Path, name: str, rule: str) -> None:
    links(folder)
    client = start(footprint_sources=(str(folder),)).client
    refused(build(client, f"{folder}/{name}"), 422, "sources[0]", rule)
    refused(build(client, f"{folder}/a.parquet", f"{folder}/{name}"), 422, "sources[1]", rule)


def test_a_link_within_is_followed_and_a_folder_behind_one_is_not_walked(start: Start, folder: Path) -> None:
    (folder / "deep" / "link.parquet").symlink_to("../a.parquet")
    (folder / "deep" / "up").symlink_to("..")
    client = start(footprint_sources=(str(folder),)).client
    found = build(client, f"{folder}/deep/**").json()["traces"]
    assert sorted(trace["name"] for trace in found) == ["b.parquet", "link.parquet"]


def test_nothing_is_put_in_its_place_while_it_waits(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a file and its opening."""
    client = start(footprint_sources=(str(folder),)).client
    real = source_builds.reduced

    def swapped(by: Callable[[], object], rule: str) -> None:
        def held(*given: Any) -> Any:
            by()
            return real(*given)

        monkeypatch.setattr(source_builds, "reduced", held)
        write(folder / "a.parquet", 1)
        refused(build(client, f"{folder}/a.parquet"), 422, "sources", rule)
        (folder / "a.parquet").unlink(missing_ok=True)

    def link() -> None:
        (folder / "a.parquet").unlink()
        (folder / "a.parquet").symlink_to(folder.parent / "secret" / "a.parquet")

    swapped(lambda: write(folder / "a.parquet", 5, 4000), "must not change while it is read")
    swapped(link, "must not lead out of")
    swapped((folder / "a.parquet").unlink, "must exist")


def test_a_file_that_is_written_to_while_it_is_read_is_refused(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(footprint_sources=(str(folder),)).client
    real = source_builds.trace_in

    def written(*given: Any) -> Any:
        os.utime(folder / "a.parquet", ns=(1, 1))
        return real(*given)

    monkeypatch.setattr(source_builds, "trace_in", written)
    refused(build(client, f"{folder}/a.parquet"), 422, "sources", "must not change while it is read")


def test_neighbours_have_places_of_their_own(start: Start, folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret" / "a.parquet")
    store: TokenStore = MemoryTokens()
    tokens = {}
    for tenant, scope in (("red", "write"), ("blue", "write"), ("green", "write"), ("red", "read")):
        record, token = mint("t", tenant=tenant, scope=scope, now=datetime.now(UTC))
        store.add(record)
        tokens[tenant, scope] = {"Authorization": f"Bearer {token}"}
    secret = folder.parent / "secret"
    client = start(store, footprint_sources=(f"red={folder}", f"blue={secret}")).client
    for who, path, said in (
        (("red", "write"), folder / "a.parquet", ""),
        (("blue", "write"), secret / "a.parquet", ""),
        (("red", "write"), secret / "a.parquet", f"must be below {folder} "),
        (("red", "write"), folder / "link", "must not lead out of"),
        (("blue", "write"), folder / "a.parquet", f"must be below {secret} "),
        (("green", "write"), folder / "a.parquet", "lists no place"),
    ):
        reply = build(client, path, headers=WAIT | tokens[who])
        assert reply.status_code == (422 if said else 201) and said in reply.text, reply.text
    assert build(client, folder / "a.parquet", headers=WAIT | tokens["red", "read"]).status_code == 403
    assert build(client, folder / "a.parquet").status_code == 401


def test_without_a_place_nothing_is_read(client: ContractClient, folder: Path) -> None:
    refused(build(client, folder / "a.parquet"), 422, "sources", "lists no place whose traces may be read")


def test_bounds(start: Start, folder: Path) -> None:
    small = start(footprint_sources=(str(folder),), max_source_files=2).client
    assert build(small, f"{folder}/*.parquet", f"{folder}/a.parquet").status_code == 201
    refused(build(small, f"{folder}/**"), 429, "max_source_files", "at most 2 files may be read for one footprint")
    size = (folder / "a.parquet").stat().st_size
    short = start(footprint_sources=(str(folder),), max_source_bytes=size).client
    assert build(short, f"{folder}/a.parquet").status_code == 201
    refused(build(short, f"{folder}/**"), 429, "max_source_bytes", f"may have {size:,} bytes together")
    quick = start(footprint_sources=(str(folder),), source_seconds=1e-9).client
    refused(build(quick, f"{folder}/a.parquet"), 429, "source_seconds", "takes longer than 1e-09 seconds")
    narrow = start(footprint_sources=(str(folder),), footprint_memory_bytes=1 << 20).client
    write(folder / "many.parquet", 1, 300_000)
    refused(build(narrow, f"{folder}/many.parquet", level="bytes"), 422, None, "many.parquet: ")


def test_folders_with_too_many_names_are_refused(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.source_files._MOST_LOOKED", 3)
    client = start(footprint_sources=(str(folder),)).client
    refused(build(client, f"{folder}/**/x*"), 422, "sources[0]", "its folders have more than 3 names")


def test_a_file_that_unpacks_to_more_is_refused(start: Start, folder: Path) -> None:
    line = b" S 1000,8\n"
    (folder / "bomb.log.zst").write_bytes(zstandard.compress(line * 1_000_000))
    client = start(footprint_sources=(str(folder),), max_source_bytes=1 << 20).client
    reply = build(client, f"{folder}/bomb.log.zst", address="flat")
    refused(reply, 422, None, "bomb.log.zst: may unpack to 1,048,576 bytes, and has more")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "is empty"),
        (b"PAR1 and nothing else", "bad: "),
        (b"\x7fELF" + bytes(100), "bad: "),
        (b"gpa,size\n1,8\n1,0\n", "bad: line 3: size must be "),
        (zstandard.compress(b"gpa,size\n" * 999)[:-5], "the compressed data end early"),
    ],
)
def test_what_is_no_trace_is_told_with_its_name(start: Start, folder: Path, content: bytes, rule: str) -> None:
    (folder / "bad").write_bytes(content)
    client = start(footprint_sources=(str(folder),)).client
    reply = build(client, f"{folder}/a.parquet", f"{folder}/bad")
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid-trace"), reply.text
    assert rule in reply.json()["rule"] and f"{folder}/bad: " in reply.json()["rule"]
    job = ended(client, build(client, f"{folder}/bad", headers=ASYNC).headers["Location"])
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-trace")


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"sources": []}, "sources"),
        ({"sources": ["/x"] * 101}, "sources"),
        ({"sources": "/x"}, "sources"),
        ({"sources": [7]}, "sources[0]"),
        ({"sources": [None]}, "sources[0]"),
        ({"sources": ["/" + "x" * 2000]}, "sources[0]"),
        ({"level": "pages"}, "level"),
        ({"by": "time:0"}, "by"),
        ({"by": "pc,pc"}, "by"),
        ({"format": "elf"}, "format"),
        ({"record": "x"}, "record"),
        ({"address": "gva"}, "address"),
        ({"endpoint_override": "127.0.0.1:1"}, "endpoint_override"),
    ],
)
def test_bodies_that_are_wrong(start: Start, folder: Path, members: dict[str, Any], field: str) -> None:
    client = start(footprint_sources=(str(folder),)).client
    body = {"sources": [f"{folder}/a.parquet"], **members}
    reply = client.post("/v1/footprints:build", json=body, headers=WAIT)
    assert (reply.status_code, reply.json()["field"]) == (422, field), reply.text


def test_a_file_whose_name_is_not_printable_is_told(start: Start, folder: Path) -> None:
    (folder / "deep" / os.fsdecode(b"\xff\x01")).write_bytes(b"x")
    client = start(footprint_sources=(str(folder),)).client
    refused(build(client, f"{folder}/deep/**"), 422, "sources[0]", "has a file whose name is not printable: '")


def test_a_store_that_does_not_answer_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neither where it was looked for, nor with what."""
    for name, value in (("ACCESS_KEY_ID", "AKIA"), ("SECRET_ACCESS_KEY", "hush"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    place = "s3://boots/kernels?endpoint_override=127.0.0.1:1&scheme=http&region=here"
    client = start(footprint_sources=(place,)).client
    reply = build(client, "s3://boots/kernels/**")
    refused(reply, 422, "sources[0]", "cannot be read: the store answers NETWORK_CONNECTION")
    assert not any(word in reply.text for word in ("127.0.0.1", "hush", "AKIA", "here")), reply.text


def test_a_cluster_that_does_not_answer_fails_the_job(start: Start, folder: Path) -> None:
    pytest.importorskip("ray")
    client = start(footprint_sources=(str(folder),), ray_address="127.0.0.1:1").client
    reply = build(client, f"{folder}/a.parquet")
    assert (reply.status_code, reply.json()["code"]) == (503, "cluster-unavailable"), reply.text
    assert reply.json()["rule"].endswith("cannot do it: no cluster of Ray answers there")
    refused(build(client, f"{folder}/nothing"), 422, "sources[0]", "must exist")
    assert client.get("/livez").status_code == 200


def test_without_ray_the_extra_is_named(
    start: Start, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ray.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    client = start(footprint_sources=(str(folder),), ray_address="auto").client
    reply = build(client, f"{folder}/a.parquet")
    assert reply.status_code == 503 and "Ray is not installed: `pip install 'subpage[scale]'`" in reply.json()["rule"]


def test_a_service_knows_nothing_of_ray() -> None:
    """Wherever its work is done."""
    looking = "import sys, service.app, service.runtime.handed_over; assert not {'ray', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", looking], check=True)
