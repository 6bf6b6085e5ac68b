"""``subpage replay``: the same figures as over HTTP, without a service."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from typer.testing import CliRunner

from engine.trace import option_names
from service.cli import local, replay
from service.cli.app import app
from service.cli.trace_options import Address
from service.runtime.job import Job
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.bodies import FORMATS, table

runner = CliRunner()
OBJECTS = [{"name": "hit", "gpa": "0x2080", "size": 64}, {"name": "missed", "gpa": 8192, "size": 64}]
TRACE = table(gpa=[0x1000, 0x2080, 0x20C0, 0x5008, 0xFEE00000], size=[8, 8, 8, 8, 4])
TOML = """
name = "both"
[vm]
profile = "kvm-latest"
memory_slots = [{slot = 0, gpa = 0, size = "0x10000"}]
[[protections]]
name = "kernel"
objects = [{name = "hit", gpa = "0x2080", size = 64}, {name = "missed", gpa = 8192, size = 64}]
[[subpages]]
gfn = 5
access = "0xfffffffe"
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


def run(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["replay", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output if status else result.stdout


@pytest.mark.parametrize("name", FORMATS)
def test_the_document_is_the_one_of_the_service(
    name: str, policy: Path, write: Callable[[str], Path], client: ContractClient, make_vm: Callable[..., str]
) -> None:
    path = write(name)
    found = json.loads(run(path, "--policy", policy, "--json", "--include", "all", "--no-progress"))
    slots = [{"slot": 0, "gpa": 0, "size": 0x10000}]
    vm = make_vm(profile="kvm-latest", memory_slots=slots)
    client.post(f"{vm}/protections", json={"name": "kernel", "objects": OBJECTS})
    client.patch(f"{vm}/subpages", json={"ranges": [{"gfn": 5, "access": "0xfffffffe"}]})
    body = FORMATS[name](TRACE)
    query = {"include": "all"} | ({"record": "record16"} if name == "packed" else {})
    answered = client.post(
        f"{vm}/traces", params=query, content=path.read_bytes(), headers={"Content-Type": body.headers["Content-Type"]}
    ).json()
    own = ("id", "vm", "created", "seconds")
    assert {key: value for key, value in found.items() if key not in own} == {
        key: value for key, value in answered.items() if key not in own
    }
    assert found["violations"] == 3 and found["by_object"]["hit"]["violations"] == 2 and found["mmio"] == 1


def test_the_report(policy: Path, write: Callable[[str], Path]) -> None:
    told = run(write("parquet"), "--policy", policy)
    assert "both against" in told and "2 sub-pages of 128 bytes protected, in 1 pages" in told
    assert "no object" in told and "in this process" in told and "Where to look next" not in told
    assert "Note: 20 % of the writes lie outside every slot" in told and "`address=gva`" in told


def test_whole_pages_of_a_machine_without_spp(tmp_path: Path, write: Callable[[str], Path]) -> None:
    policy = tmp_path / "pages.json"
    whole = {"name": "kernel", "objects": [{**OBJECTS[0], "granularity": "page"}], "pages": [["0x5", 1, 0]]}
    vm = {"spp": False, "host": {"spp": False}, "memory_slots": [{"slot": 0, "gpa": 0, "size": "0x10000"}]}
    policy.write_text(json.dumps({"vm": vm, "protections": [whole]}), encoding="utf-8")
    found = json.loads(run(write("parquet"), "--policy", policy, "--json", "--no-progress"))
    assert (found["violations"], found["by_object"]["hit"]["collateral"]) == (3, 1)


def test_a_policy_as_the_demo_takes_it(tmp_path: Path, write: Callable[[str], Path]) -> None:
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"name": "two_objects", "about": "x", "objects": OBJECTS}))
    policy = local.read_policy(path)
    assert policy.name == "two_objects" and policy.vm.spp and policy.vm.memory_slots[0].size == 1 << 30
    assert json.loads(run(write("arrow"), "--policy", path, "--json", "--exits", 0))["violations"] == 2
    far = {"protections": [{"name": "p", "objects": [{"name": "o", "gpa": 5 << 30, "size": 1}]}]}
    path.write_text(json.dumps(far))
    policy = local.read_policy(path)
    assert policy.vm.memory_slots[0].size == (5 << 30) + 4096 and policy.name == "objects"


def test_options(policy: Path, write: Callable[[str], Path], tmp_path: Path) -> None:
    def result(*options: object) -> dict[str, Any]:
        return json.loads(run(path, "--policy", policy, "--json", *options))

    path = write("ndjson")
    assert result("--on-violation", "stop")["stopped_at"] == 1
    assert result("--start", 2)["records"] == 3
    limited = result("--max-exit-records", 1)
    assert limited["exit_records_dropped"] == 2 and len(limited["exit_records"]) == 1
    path.write_text('{"gpa": 8320, "pc": 7}\n')
    assert result("--carry", "pc")["exit_records"][0]["pc"] == 7
    path.write_text('{"gpa": 4096, "gva": 8320}\n')
    assert [result("--address", whose)["violations"] for whose in ("gpa", "flat")] == [0, 1]
    assert "load its memory" in run(path, "--policy", policy, "--address", "gva", status=2)
    path = tmp_path / "trace"
    path.write_bytes((0x2080).to_bytes(8, "little"))
    assert result("--format", "packed", "--record", "gpa8")["violations"] == 1


SAMPLES = Path(__file__).parents[2] / "data" / "tools"


def _policy(path: Path, **at: int) -> Path:
    objects = [{"name": name, "gpa": gpa, "size": 8} for name, gpa in at.items()]
    path.write_text(json.dumps({"objects": objects}))
    return path


def test_what_tools_wrote_is_replayed_as_it_is(tmp_path: Path) -> None:
    """`boot` of the samples stores to 0x4000 + 128 n, to 0x5000 and to its stack."""
    policy = _policy(tmp_path / "policy.json", written=0x4080, untouched=0x9000)
    sample = SAMPLES / "qemu-system-execlog.txt"
    told = run(sample, "--policy", policy)
    assert told.startswith(f"{sample}: execlog; physical addresses of a guest; sizes assumed: 8 bytes\n\n")
    for format in ("auto", "execlog"):
        found = json.loads(run(sample, "--policy", policy, "--format", format, "--json"))
        assert found["format"] == "execlog" and found["writes"] == 12
        assert found["by_object"]["written"]["violations"] == 1 and not found["by_object"]["untouched"]["violations"]
    assert "line 1: " in run(sample, "--policy", policy, "--format", "bochs", status=1)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstandard.ZstdCompressor(20).compress])
def test_a_compressed_trace_is_replayed_as_it_is(
    pack: Callable[[bytes], bytes], tmp_path: Path, policy: Path, write: Callable[[str], Path]
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(pack((SAMPLES / "bochs-trace-mem.txt").read_bytes()))
    assert json.loads(run(path, "--policy", policy, "--json"))["writes"] == 12
    for name in ("ndjson", "packed", "arrow"):
        plain = write(name)
        packed = plain.with_name(plain.name + ".z" if name != "packed" else "trace.bin.gz")
        packed.write_bytes(pack(plain.read_bytes()))
        assert json.loads(run(packed, "--policy", policy, "--json", "--progress"))["violations"] == 3
        packed.write_bytes(packed.read_bytes()[:-5])
        assert "the compressed data" in run(packed, "--policy", policy, status=1)
    whole = tmp_path / "whole"
    whole.write_bytes(pack(write("parquet").read_bytes()))
    assert "a Parquet file is compressed inside" in run(whole, "--policy", policy, status=1)


def test_tables_and_foreign_lines(tmp_path: Path) -> None:
    policy = _policy(tmp_path / "policy.json", one=0x1000)
    path = tmp_path / "trace.txt"
    path.write_text("addr;len\n4096;4\n0x2000;8\n")
    found = json.loads(run(path, "--policy", policy, "--columns", "gpa=addr,size=len", "--json"))
    assert (found["format"], found["writes"], found["violations"]) == ("csv", 2, 1)
    path.write_text((SAMPLES / "lackey.txt").read_text() + "hello\n")
    assert f"{path}: line " in run(path, "--policy", policy, status=1)
    assert "skipped 1: " in run(path, "--policy", policy, "--skip-unknown")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "must be an object"),
        ("{", "line 1, column 2: not JSON"),
        ('{"objects": [{"name": "o"}]}', "policy.json: objects[0].size: is required"),
        ('{"vmm": {}}', "vmm: is not a member"),
        ('{"vm": {"spp": 7}}', "vm.spp"),
        ('{"vm": []}', "vm:"),
        ('{"vm": {"maxphyaddr": 1}}', "maxphyaddr"),
        ('{"subpages": [{"gfn": 1, "access": []}]}', "subpages[0].access"),
        (
            '{"protections": [{"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 0}]}]}',
            "protections[0].objects[0].size",
        ),
    ],
)
def test_policies_that_are_refused(text: str, told: str, tmp_path: Path, write: Callable[[str], Path]) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    assert told in run(write("json"), "--policy", path, status=1)


def test_traces_that_are_refused(policy: Path, tmp_path: Path, write: Callable[[str], Path]) -> None:
    path = write("ndjson")
    path.write_text('{"gpa": 8}\n{"gpa": 8, "vcpu": 3}\n')
    assert "record 1: vcpu: " in run(path, "--policy", policy, status=1)
    assert "carry" in run(path, "--policy", policy, "--carry", "gpa", status=1)
    assert "there is no such file" in run(tmp_path / "none.bin", "--policy", policy, status=1)
    unknown = tmp_path / "trace"
    unknown.write_text("what is this\n")
    assert "of no format that is recognised; say --format" in run(unknown, "--policy", policy, status=1)
    lost = tmp_path / "t.ndjson"
    lost.write_text("[1, 2]\n")
    assert "line 1: a record must be an object" in run(lost, "--policy", policy, status=1)
    assert "--format" in run(path, "--policy", policy, "--format", "xml", status=2)


def test_the_bar(policy: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = runner.invoke(app, ["replay", str(write("packed")), "--policy", str(policy), "--json", "--progress"])
    assert result.exit_code == 0 and "replaying" in result.stderr and "5 records" in result.stderr
    json.loads(result.stdout)


def test_how_far_it_is(policy: Path, write: Callable[[str], Path]) -> None:
    shares: list[float] = []
    for name in ("packed", "parquet", "ndjson"):
        path = write(name)
        wanted = local.Options().request(path, Settings())
        local.run(
            path, local.create(local.read_policy(policy), Settings()), wanted, lambda job: shares.append(job.share)
        )
    assert set(shares[-1:]) == {1.0} and all(0 <= share <= 1 for share in shares)


def test_an_interruption(policy: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def interrupted(job: Job) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    machine = local.create(local.read_policy(policy), Settings())
    path = write("packed")
    with pytest.raises(KeyboardInterrupt):
        local.run(path, machine, local.Options().request(path, Settings()), interrupted)
    assert jobs[0].halt == "cancelled"

    def keyboard(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run", keyboard)
    assert "interrupted" in run(path, "--policy", policy, status=130)


def test_a_defect_is_not_hidden(policy: Path, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(local, "replay", broken)
    path = write("packed")
    with pytest.raises(RuntimeError, match="a defect"):
        local.run(path, local.create(local.read_policy(policy), Settings()), local.Options().request(path, Settings()))


def test_the_choices_are_those_of_the_engine() -> None:
    """The command line names them again, so that a help text does not load the engine."""
    assert {item.value for item in Address} == set(option_names.ADDRESSES)
    assert set(replay.Include) == set(option_names.INCLUDE)
    assert set(replay.OnViolation) == set(option_names.ON_VIOLATION) - {option_names.ASK}
