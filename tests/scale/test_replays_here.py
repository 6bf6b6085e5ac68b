"""``subpage replay --policies``: every trace against every policy, each as ``subpage replay --policy`` does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from service.cli import local, replay_many
from tests.scale.replays import NAMES, OPTIONS, answers, policies_in
from tests.scale.traces import write

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of them."""
    folder = tmp_path_factory.mktemp("traces")
    for number in range(3):
        write(folder / f"{number}.parquet", number)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies_in(tmp_path_factory.mktemp("policies"))


def test_each_is_what_one_replay_gives(run: Run, traces: Path, policies: Path, tmp_path: Path) -> None:
    many = ("replay", f"{traces}/*.parquet", "--policies", policies, "-o", tmp_path / "all", *OPTIONS)
    table = run(*many).stdout.splitlines()
    found = answers(tmp_path / "all")
    assert [(one["trace"], one["policy"]) for one in found] == [
        (f"{traces}/{number}.parquet", name) for number in range(3) for name in NAMES
    ]
    assert len(table) == 1 + len(found) and table[0].split()[:2] == ["TRACE", "POLICY"]
    for one in found:
        policy = policies / ("b.toml" if one["policy"] == "b" else f"{one['policy']}.json")
        alone = json.loads(run("replay", one["trace"], "--policy", policy, "--json", *OPTIONS).stdout)
        assert one == {**one, **{name: alone[name] for name in one if name not in ("trace", "policy")}}
    assert len({json.dumps(one["exits"]) for one in found}) > len(NAMES)  # they differ
    assert sum(len(one["exit_records"]) for one in found) > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "all"]


def test_json_is_what_the_file_has(run: Run, traces: Path, policies: Path, tmp_path: Path) -> None:
    many = ("replay", f"{traces}/0.parquet", f"{traces}/1.parquet", "--policies", policies / "a.json")
    said = json.loads(run(*many, "-o", tmp_path / "all", "--json").stdout)
    assert said == json.loads((tmp_path / "all").read_text()) and len(said["replays"]) == 2
    assert said["replays"][0]["exit_records"] == []


def test_a_run_that_was_broken_off_goes_on(
    run: Run, traces: Path, policies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in traces.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "9.parquet").write_bytes(b"PAR1 and nothing else")
    many = ("replay", f"{tmp_path}/*.parquet", "--policies", policies, "-o", tmp_path / "all")
    said = run(*many, status=1).stderr
    assert f"subpage replay: {tmp_path}/9.parquet: " in said
    kept = f"the results of 9 of 12 replays are kept in {tmp_path}/all.partials: the same command goes on from there"
    assert kept in said and not (tmp_path / "all").exists()

    done: list[str] = []
    once = local.run_in

    def counted(file: Any, size: int, name: str, *others: Any) -> Any:
        done.append(name)
        return once(file, size, name, *others)

    monkeypatch.setattr(local, "run_in", counted)
    write(tmp_path / "9.parquet", 9)
    write(tmp_path / "0.parquet", 17)  # of what has changed nothing is believed
    run(*many)
    assert sorted(done) == [f"{tmp_path}/0.parquet"] * 3 + [f"{tmp_path}/9.parquet"] * 3
    assert not (tmp_path / "all.partials").exists()
    run(*many[:-1], tmp_path / "again")
    assert (tmp_path / "all").read_bytes() == (tmp_path / "again").read_bytes()


def test_partials_are_of_what_their_names_say(run: Run, traces: Path, policies: Path, tmp_path: Path) -> None:
    one = ("replay", f"{traces}/0.parquet", "--partials", tmp_path / "kept", "--policies")
    many = (*one, policies / "a.json", "--json")
    first = run(*many).stdout
    (file,) = (tmp_path / "kept").iterdir()
    told = json.loads(file.read_text())
    told["document"]["violations"] = 12345
    file.write_text(json.dumps(told))
    assert json.loads(run(*many).stdout)["replays"][0]["violations"] == 12345  # it is theirs, and was taken
    for content, rule in (
        (json.dumps({**told, "of": ["something", "else"]}), "is of something else"),
        (json.dumps({**told, "document": 7}), "is of something else"),
        ("[1]", "is damaged"),
        ("{", "is damaged"),
    ):
        file.write_text(content)
        assert f"{file}: {rule}. Delete it, and it is made again" in run(*many, status=1).stderr
    file.unlink()
    assert run(*many).stdout == first
    # Another policy, or another way to read, is another result.
    run(*many[:-1], "--on-violation", "grant")
    run(*one, policies / "b.toml")
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{t}/0.parquet", "{t}/1.parquet", "--policy", "{p}/a.json"), "several traces go with --policies"),
        (("{t}/0.parquet", "--policy", "{p}/a.json", "--ray", "local"), "goes with --policies"),
        (("{t}/0.parquet", "--policy", "{p}/a.json", "-o", "x"), "goes with --policies"),
        (("{t}/0.parquet", "--policy", "{p}/a.json", "--partials", "x"), "goes with --policies"),
        (("{t}/0.parquet", "--policies", "{p}", "--policy", "{p}/a.json"), "goes alone: with --policies"),
        (("{t}/0.parquet", "--policies", "{p}", "--vm", "vm_1"), "is done here or by --ray, not by a service"),
        (("{t}/0.parquet", "--policies", "{p}", "--server", "http://x"), "is done here or by --ray"),
        (("{t}/0.parquet", "--policies", "{p}", "--keep"), "is done here or by --ray"),
        (("{t}/0.parquet", "--policies", "{p}", "--address", "gva"), "gva needs a machine"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, traces: Path, policies: Path, arguments: tuple[str, ...], said: str
) -> None:
    given = [text.format(t=traces, p=policies) for text in arguments]
    assert said in run("replay", *given, status=2).stderr


def test_more_replays_than_one_run_does_are_refused(
    run: Run, traces: Path, policies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_many, "MOST", 8)
    said = run("replay", f"{traces}/*", "--policies", policies, status=1).stderr
    assert "3 traces against 3 policies are more than 8 replays" in said


def test_a_policy_that_is_none_is_told_before_anything_is_read(run: Run, tmp_path: Path, traces: Path) -> None:
    (tmp_path / "p.json").write_text('{"objects": [{"name": "o", "gpa": 0, "size": 0}]}')
    said = run("replay", f"{traces}/*", "--policies", tmp_path, "-o", tmp_path / "all", status=1).stderr
    assert said.startswith(f"subpage replay: {tmp_path}/p.json: objects[0].size: ")
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_samples_are_told_of(run: Run, traces: Path, policies: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(traces / "0.parquet")
    pq.write_table(table.replace_schema_metadata({"subpage.recording": '{"sample": 8}'}), tmp_path / "sample.parquet")
    (tmp_path / "no.log").write_text(" S 1000,8\n")
    alone = "A sample: of every 8 stores of a vCPU one was recorded, and what is counted is of these alone."
    building = ("footprint", "build", tmp_path / "sample.parquet", "-o", tmp_path / "f")
    assert run(*building).stderr == f"{alone}\n"
    several = run("footprint", "build", f"{traces}/*", f"file://{tmp_path}/sample.parquet", "-o", tmp_path / "f").stderr
    assert several.startswith("Samples: 1 of 4 traces. They have one of every 8 stores")
    assert run("footprint", "build", f"{traces}/*", "-o", tmp_path / "f").stderr == ""
    replaying = ("replay", tmp_path / "sample.parquet", "--policies", policies / "a.json")
    assert run(*replaying).stderr == f"{alone}\n"
