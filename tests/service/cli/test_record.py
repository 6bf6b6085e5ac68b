"""``subpage record``: the file that is written, and what is said of guests that cannot be recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from service.cli.app import app
from service.settings import Settings
from tests.capture.conftest import STORE, Fake, fake, libraries
from tests.support.server import running

__all__ = ["fake", "libraries"]

runner = CliRunner()
PC = 0xFFFFFFFF81234567
ACCESSES = [[0, STORE | 3, 0x7000 + 8 * n, PC] for n in range(40)]


def record(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["record", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def test_a_file_has_the_columns_of_a_trace_and_says_what_it_is_of(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "boot.parquet"
    said = record("-o", path, "--", *fake(accesses=ACCESSES))
    assert "40 stores to 1 pages" in said and "Not in it: accessed and dirty flags" in said
    found = pq.read_table(path)
    assert found.column_names == ["gpa", "gva", "pc", "size", "vcpu"]
    assert found["gpa"].to_pylist() == [0x6000 + 8 * n for n in range(40)]
    assert json.loads(found.schema.metadata[b"subpage.recording"]) == {
        "recorder": "subpage ring 4",
        "qemu": "10.0.2",
        "plugin_interface": 2,
        "vcpus": 1,
        "ram": [["0x0", "0x40000000"]],
        "start": None,
        "until": None,
        "sample": None,
        "only": None,
    }
    shown = runner.invoke(app, ["trace", "info", str(path)])
    assert shown.exit_code == 0 and "40" in shown.output
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_sample_says_that_it_is_one(fake: Fake, tmp_path: Path, suffix: str) -> None:
    """When it is made, in the file, and where the file is looked at or replayed."""
    path, policy, told = tmp_path / f"boot.{suffix}", tmp_path / "policy.json", "A sample: of every 16 stores of a vCPU"
    policy.write_text('{"name": "policy", "objects": [{"name": "secret", "gpa": "0x6000", "size": 8}]}')
    guest = fake(accesses=ACCESSES)
    assert told in record("-o", path, "--sample", 16, "--", *guest)
    with running(Settings(warm_up=False)) as server:
        here = ["replay", str(path), "--policy", str(policy)]
        for command in (["trace", "info", str(path)], here, [*here, "--server", server.url]):
            shown = runner.invoke(app, command)
            assert shown.exit_code == 0 and told in shown.output and "3" in shown.output, shown.output
    said = json.loads(runner.invoke(app, ["record", "-o", str(path), "--sample", "16", "--json", "--", *guest]).stdout)
    assert (said["sample"], said["taken"]) == (16, 3)
    record("-o", path, "--", *guest)
    assert "A sample" not in runner.invoke(app, ["trace", "info", str(path)]).output


def test_an_arrow_stream_has_the_same(fake: Fake, tmp_path: Path) -> None:
    for name in ("boot.parquet", "boot.arrow"):
        record("-o", tmp_path / name, "--max", 7, "--", *fake(accesses=ACCESSES))
    with pa.ipc.open_stream(tmp_path / "boot.arrow") as stream:
        assert stream.read_all().equals(pq.read_table(tmp_path / "boot.parquet"))


def test_a_qemu_that_is_killed_leaves_a_whole_file(fake: Fake, tmp_path: Path) -> None:
    said = record("-o", tmp_path / "boot.parquet", "--", *fake(accesses=ACCESSES, signal=9), status=1)
    assert "subpage record: QEMU was ended by SIGKILL" in said
    assert pq.read_table(tmp_path / "boot.parquet").num_rows == 40


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("-o", "boot.csv"), "boot.csv: the name must end in one of .parquet, .arrow, .arrows"),
        (("-o", "nowhere/boot.parquet"), "nowhere/boot.parquet: there is no folder"),
        (("-o", "a.parquet", "--start", "0xg"), "--start 0xg must be a number"),
        (("-o", "a.parquet", "--start", "0x10:0"), "--start 0x10:0: the N of WHERE:N must be at least 1"),
        (("-o", "a.parquet", "--start", "0x0"), "--start 0x0: must be an address of 64 bits, not 0"),
        (("-o", "a.parquet", "--start", "start_kernel"), "start_kernel is a symbol, which --symbols FILE must have"),
        (("-o", "a.parquet", "--only", "0x1000"), "--only 0x1000: LOW-HIGH must be a number"),
        (("-o", "a.parquet", "--only", "0x2000-0x1000"), "must be LOW-HIGH with LOW below HIGH"),
    ],
)
def test_options_are_refused_by_name(
    arguments: tuple[str, ...], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = record(*arguments, "--", "qemu-system-nowhere", status=1)
    assert said.startswith("subpage record: ") and rule in said
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_recorded_leaves_no_file(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "boot.parquet"
    assert "there is no such program" in record("-o", path, "--", "qemu-system-nowhere", status=1)
    assert "-enable-kvm: under kvm" in record("-o", path, "--", *fake(), "-enable-kvm", status=1)
    assert "QEMU ended with status 1" in record("-o", path, "--", *fake(status=1), status=1)
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--on-violation", "skip"), "--on-violation skip: TCG tells of a store when it has landed"),
        (("--sample", "10"), "--sample 10: a store that is passed over is judged by nobody: totals would be wrong"),
        (("--rules", "rules.toml"), "--rules rules.toml: goes with --on-violation ask"),
        (("--on-violation", "ask", "--rules", "rules.toml"), "--rules rules.toml: skip cannot be honoured"),
        (("--kallsyms-from-guest", "--symbols", "kallsyms"), "--symbols does not go with --kallsyms-from-guest"),
        (("--kallsyms-from-guest", "--start", "do_exit:0"), "--start do_exit:0: the N of WHERE:N must be at least 1"),
        (("--start", "do_exit"), "do_exit is a symbol, which --symbols FILE must have"),
    ],
)
def test_what_a_guest_that_runs_cannot_honour_is_refused(
    arguments: tuple[str, ...], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rules.toml").write_text('[[rules]]\nanswer = "allow"\nobject = "secret"\n')  # and skip otherwise
    Path("policy.json").write_text('{"objects": [{"name": "secret", "gpa": "0x1000", "size": 128}]}')
    result = runner.invoke(app, ["live", "--policy", "policy.json", *arguments, "--", "qemu-system-nowhere"])
    assert result.exit_code == 1 and rule in result.output, result.output
