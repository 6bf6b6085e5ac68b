"""Replays by a cluster: equal to those of one process, whatever is lost meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.scale.nodes import begun
from tests.scale.replays import OPTIONS, policies_in
from tests.scale.traces import write
from tests.support.waiting import until

pytestmark = [pytest.mark.scale, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of them."""
    folder = tmp_path_factory.mktemp("traces")
    for number in range(4):
        write(folder / f"{number}.parquet", number, 20_000)
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies_in(tmp_path_factory.mktemp("policies"))


def test_objects_are_replayed_by_workers(
    cluster: Any, run: Run, traces: Path, policies: Path, store: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    for path in traces.iterdir():
        store(f"replayed/{path.name}", path.read_bytes())
    many = ("replay", "s3://traces/replayed/*.parquet", "--policies", policies, *OPTIONS)
    kept = ("--partials", "s3://traces/results")
    done = run(*many, *kept, "--ray", cluster.address, "-o", tmp_path / "there")
    assert done.stderr == ""
    run(*many, "-o", tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    # Whoever asks for the same finds it there.
    run(*many, *kept, "-o", tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "here").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "here", "there"]


def test_what_is_wrong_with_a_trace_is_told_and_the_others_are_kept(
    cluster: Any, run: Run, traces: Path, policies: Path, tmp_path: Path
) -> None:
    for path in traces.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "9.parquet").write_bytes(b"PAR1 and nothing else")
    many = ("replay", f"{tmp_path}/*.parquet", "--policies", policies, "-o", tmp_path / "all")
    said = run(*many, "--ray", cluster.address, status=1).stderr
    assert f"{tmp_path}/9.parquet: " in said and "replays are kept in" in said
    (tmp_path / "9.parquet").unlink()
    run(*many)  # goes on here
    run("replay", f"{tmp_path}/*.parquet", "--policies", policies, "-o", tmp_path / "here")
    assert (tmp_path / "all").read_bytes() == (tmp_path / "here").read_bytes()


def test_a_node_that_is_killed_changes_nothing_but_time(
    cluster: Any, run: Run, traces: Path, policies: Path, tmp_path: Path
) -> None:
    """It has two of three processors."""
    for number in range(6):
        for path in traces.iterdir():
            (tmp_path / f"{number}-{path.name}").symlink_to(path)
    many = ("replay", f"{tmp_path}/*.parquet", "--policies", str(policies), *OPTIONS, "-o")
    partials = tmp_path / "all.partials"
    node = begun(lambda: cluster.add_node(num_cpus=2, object_store_memory=100 << 20))
    command = [sys.executable, "-m", "service.cli", *many, str(tmp_path / "all"), "--ray", cluster.address]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        until(lambda: (partials.exists() and len(list(partials.iterdir())) >= 18) or running.poll() is not None, 240)
        cluster.remove_node(node, allow_graceful=False)
        assert running.poll() is None and len(list(partials.iterdir())) < 72
        said = running.communicate(timeout=240)[1]
    finally:
        running.kill()
    assert running.returncode == 0, said
    run(*many, tmp_path / "here")
    assert (tmp_path / "all").read_bytes() == (tmp_path / "here").read_bytes()
