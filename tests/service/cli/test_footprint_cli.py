"""``subpage footprint``: traces in, costs and advice out, and what is refused with a line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.footprint.places import LEVELS
from engine.state.profiles import PROFILES
from service.cli import footprint as command
from service.cli.app import app
from tests.support.bodies import table

runner = CliRunner()
# Beside modprobe_path three times, on it once, elsewhere in its page once, and in another page.
GPAS = [0x2000, 0x2000, 0x2000, 0x2040, 0x2800, 0x5000]
TRACE = table(gpa=GPAS, size=[8] * 6, access=[1] * 5 + [0], pc=[1, 1, 2, 2, 3, 3], time=[0, 10, 20, 30, 40, 2 * 10**9])
OBJECT = {"name": "modprobe_path", "gpa": "0x2040", "size": 8}


def run(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["footprint", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output if status else result.stdout


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A folder of three, two of which have one name."""
    folder = tmp_path / "policies"
    folder.mkdir()
    whole = {**OBJECT, "granularity": "page"}
    for name, objects in (("a", [OBJECT]), ("b", [whole]), ("c", [{**OBJECT, "name": "far", "gpa": "0x8000"}])):
        document = {"objects": objects} if name != "b" else {"name": "a", "objects": objects}
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture
def fine(tmp_path: Path, write: Callable[[str], Path]) -> Path:
    """A footprint of bytes, apart by writer and time."""
    path = tmp_path / "fine.footprint"
    run("build", write("parquet"), "-o", path, "--level", "bytes", "--by", "pc", "--by", "time:20ns")
    return path


def test_the_words_are_those_of_the_engine() -> None:
    assert tuple(item.value for item in command.Level) == LEVELS
    assert tuple(item.value for item in command.Profile) == PROFILES


def test_what_is_built_is_shown(fine: Path) -> None:
    found = json.loads(run("show", fine, "--json"))
    assert (found["records"], found["writes"], found["pages"], found["subpages"]) == (6, 5, 2, 3)
    assert found["by"] == {"time": 20, "records": None, "pc": True}
    assert found["traces"][0]["name"] == "trace.parquet" and found["traces"][0]["format"] == "parquet"
    assert found["traces"][0]["columns"] == ["gpa", "size", "access", "time", "pc"]
    assert [row["writes"] for row in found["timeline"]] == [2, 2, 1, 0]
    assert [row["pc"] for row in found["top_writers"]] == ["0x1", "0x2", "0x3"]
    text = run("show", fine)
    assert "6, 5 of them writes" in text and "0x2000" in text and "BUCKET" in text


def test_policies_are_ranked_by_what_they_cost(fine: Path, policies: Path) -> None:
    found = json.loads(run("cost", fine, "--policies", policies, "--memory-slots", "0:1MiB", "--json"))
    assert list(found["policies"]) == ["c", "a", "b"]
    assert [item["violations"] for item in found["policies"].values()] == [0, 4, 5]
    assert found["policies"]["a"]["by_object"]["modprobe_path"] == {
        "subpages": 1,
        "violations": 4,
        "collateral": 3,
        "first_index": 0,
        "first_trace": "trace.parquet",
    }
    assert found["policies"]["a"]["page_granular_violations"] == 5
    assert found["assumed"] is None and found["memory_slots"][0]["size"] == "0x100000"
    text = run("cost", fine, "--policies", policies, "-n", 2)
    assert "writable memory everywhere" in text and "1 dearer policies" in text
    assert text.index("\nc ") < text.index("\na ")


def test_a_footprint_says_what_a_replay_does(fine: Path, policies: Path, write: Callable[[str], Path]) -> None:
    for name in ("a", "b"):
        replay = runner.invoke(
            app, ["replay", str(write("parquet")), "--policy", str(policies / f"{name}.json"), "--json"]
        )
        wanted = json.loads(replay.stdout)
        found = json.loads(run("cost", fine, "--policies", policies / f"{name}.json", "--json"))["policies"]["a"]
        for total in ("violations", "page_granular_violations", "mmio", "unenforced_writes"):
            assert found[total] == wanted[total]


def test_without_bytes_collateral_is_not_known(tmp_path: Path, write: Callable[[str], Path], policies: Path) -> None:
    run("build", write("packed"), "-o", tmp_path / "f")
    found = json.loads(run("cost", tmp_path / "f", "--policies", policies / "a.json", "--json"))
    assert found["policies"]["a"]["by_object"]["modprobe_path"]["collateral"] is None
    assert "?" in run("cost", tmp_path / "f", "--policies", policies / "a.json")


@pytest.mark.parametrize("flags", [":ro", ":2MiB", ":ro:1GiB"])
def test_slots_have_flags(fine: Path, policies: Path, flags: str) -> None:
    slots = ("--memory-slots", f"0:1GiB{flags}")
    found = json.loads(run("cost", fine, "--policies", policies / "a.json", *slots, "--json"))["policies"]["a"]
    assert found["violations"] == 0
    assert (found["mmio"], found["unenforced_writes"]) == ((5, 0) if "ro" in flags else (0, 4))


def test_merged_in_any_order_files_are_equal_and_can_be_taken_apart(
    tmp_path: Path, write: Callable[[str], Path]
) -> None:
    files = []
    for number, kind in enumerate(("parquet", "packed", "ndjson")):
        files.append(tmp_path / f"{number}.footprint")
        run("build", write(kind), "-o", files[-1])
    run("merge", *files, "-o", tmp_path / "one")
    run("merge", files[2], files[0], files[1], "-o", tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    run("build", *(write(kind) for kind in ("ndjson", "parquet", "packed")), "-o", tmp_path / "together")
    assert (tmp_path / "together").read_bytes() == (tmp_path / "one").read_bytes()
    run("subtract", tmp_path / "one", files[0], "-o", tmp_path / "left")
    assert len(json.loads(run("show", tmp_path / "left", "--json"))["traces"]) == 2


def test_advice_names_neighbours_and_keeps_to_a_budget(fine: Path, policies: Path) -> None:
    found = json.loads(run("advise", fine, "--policy", policies / "b.json", "--per-million", 200_000, "--json"))
    assert found["neighbours"]["modprobe_path"][0] == {"gpa": "0x2000", "size": 8, "violations": 3}
    assert [(item["action"], item["saves"]) for item in found["advice"]] == [("move", 4), ("narrow", 1)]
    assert found["within_budget"]["dropped"] == ["modprobe_path"]
    text = run("advise", fine, "--policy", policies / "a.json", "--per-second", 100)
    assert "3 of 4 exits are its neighbours'" in text and "within the budget" in text
    assert "move modprobe_path to sub-pages of its own: 3 exits fewer, 1 are left" in text


Refusal = tuple[list[Any], str]


def test_refusals_say_what_to_do(tmp_path: Path, fine: Path, policies: Path, write: Callable[[str], Path]) -> None:
    spans = tmp_path / "spans"
    run("build", write("packed"), "-o", spans)
    (tmp_path / "empty").mkdir()
    cases: list[Refusal] = [
        (["build", write("packed"), "-o", tmp_path / "f", "--by", "pc"], "has no column pc"),
        (["build", write("packed"), "-o", tmp_path / "f", "--by", "size"], "--by size: must be time:N"),
        (["build", write("packed"), "-o", tmp_path / "f", "--by", "records:0"], "at least 1"),
        (["build", write("packed"), "-o", write("packed")], "is a file that is read"),
        (["build", write("packed"), "-o", tmp_path], "is a folder"),
        (["build", write("packed"), "-o", tmp_path / "f", "--address", "gva"], "page tables"),
        (["show", write("parquet")], "subpage footprint build"),
        (["show", tmp_path / "gone"], "there is no such file"),
        (["merge", spans, fine, "-o", tmp_path / "f"], "must be of one level"),
        (["subtract", spans, fine, "-o", tmp_path / "f"], "must be of one level"),
        (["cost", fine, "--policies", tmp_path / "empty"], "has no policy in it"),
        (["cost", fine, "--policies", policies, "--memory-slots", "0:4096"], "must have a memory slot"),
        (["cost", fine, "--policies", policies, "--memory-slots", "0:4096:rw"], "rw must be ro, 2MiB or 1GiB"),
        (["advise", spans, "--policy", policies / "a.json"], "must be bytes"),
        (["advise", spans, "--policy", policies / "a.json", "--per-second", "1"], "has times"),
        (["advise", fine, "--policy", policies / "a.json", "--per-second", "1", "--per-million", "1"], "one of them"),
    ]
    for arguments, told in cases:
        assert told in run(*arguments, status=1), arguments
    assert not (tmp_path / "f").exists()


def test_traces_of_tools_are_built(tmp_path: Path) -> None:
    samples = Path(__file__).parents[2] / "data" / "tools"
    run("build", samples / "lackey.txt", samples / "bochs-trace-mem.txt", "-o", tmp_path / "f")
    found = json.loads(run("show", tmp_path / "f", "--json"))
    assert {(item["format"], item["address"]) for item in found["traces"]} == {("lackey", "flat"), ("bochs", "gpa")}
    refused = run("build", samples / "hyperdbg-monitor.log", "-o", tmp_path / "g", status=1)
    assert "--address flat" in refused
