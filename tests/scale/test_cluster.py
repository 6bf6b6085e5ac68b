"""Footprints by a cluster: equal to those of one process, whatever is lost meanwhile.

One cluster of two nodes for all of them; nodes are added where one is to be killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.scale.nodes import begun
from tests.scale.traces import write

pytestmark = [pytest.mark.scale, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
SUBPAGE = [sys.executable, "-m", "service.cli"]
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve traces."""
    made = tmp_path_factory.mktemp("traces")
    for number in range(12):
        write(made / f"{number:02}.parquet", number, 20_000, groups=4)
    return made


@pytest.fixture(scope="session")
def here(folder: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Their footprint, made in one process."""
    output = tmp_path_factory.mktemp("here") / "f"
    run("footprint", "build", f"{folder}/*.parquet", "-o", output)
    return output.read_bytes()


def test_objects_are_reduced_by_workers(
    cluster: Any, run: Run, folder: Path, here: bytes, store: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    for path in folder.iterdir():
        store(f"boots/{path.name}", path.read_bytes())
    pattern, address = "s3://traces/boots/*.parquet", ("--ray", cluster.address)
    kept = ("--partials", "s3://traces/kept")
    done = run("footprint", "build", pattern, *address, *kept, "-o", tmp_path / "f", "--json")
    assert json.loads(done.stdout)["traces"] == 12 and done.stderr == ""
    assert (tmp_path / "f").read_bytes() == here
    # Whoever asks for the same finds it there.
    run("footprint", "build", pattern, *kept, "-o", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == here
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g"]


def test_policies_are_asked_by_workers(cluster: Any, run: Run, folder: Path, here: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(here)
    (tmp_path / "policies").mkdir()
    for number in range(100):
        item = {"name": "one", "gpa": hex(number * 4096), "size": 64}
        (tmp_path / "policies" / f"{number}.json").write_text(json.dumps({"objects": [item]}))
    asked = ("footprint", "cost", tmp_path / "f", "--policies", tmp_path / "policies", "--json")
    assert run(*asked, "--ray", cluster.address).stdout == run(*asked).stdout


def test_what_is_wrong_with_a_file_is_told_and_the_others_are_kept(
    cluster: Any, run: Run, folder: Path, here: bytes, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "99.parquet").write_bytes(b"PAR1 and nothing else")
    building = ("footprint", "build", f"{tmp_path}/*.parquet", "--ray", cluster.address, "-o", tmp_path / "f")
    said = run(*building, status=1).stderr
    assert f"{tmp_path}/99.parquet: " in said
    assert f"are kept in {tmp_path}/f.partials: the same command goes on from there" in said
    (tmp_path / "99.parquet").unlink()
    run(*building)
    assert (tmp_path / "f").read_bytes() == here and not (tmp_path / "f.partials").exists()


def test_a_file_that_vanishes_is_told(cluster: Any, folder: Path, tmp_path: Path) -> None:
    """It was there when the pattern was looked up."""
    from scale import build
    from scale.errors import ScaleError
    from scale.sources import expand
    from tests.scale.traces import job, reducing

    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    sources = expand([f"{tmp_path}/*.parquet"])
    (tmp_path / "07.parquet").unlink()
    with pytest.raises(ScaleError, match=r"07\.parquet: there is no such file"):
        on_cluster(cluster, job(reducing(), tmp_path / "kept"), sources, build.Progress(0, 0))


def on_cluster(cluster: Any, job: Any, sources: Any, progress: Any) -> Any:
    """As the command does it, in this process."""
    from scale.cluster import cluster as connected

    with connected(cluster.address) as ray:
        from scale import on_ray

        return on_ray.built(ray, job, sources, progress)


def test_large_files_are_taken_apart(cluster: Any, folder: Path, here: bytes) -> None:
    from scale import build
    from scale.sources import expand
    from tests.scale.traces import content, job, reducing

    sources = expand([f"{folder}/*.parquet"])
    found = on_cluster(cluster, job(reducing(), split=sources[0].size // 3), sources, build.Progress(0, 0))
    assert content(found) == here


def test_a_node_that_is_killed_changes_nothing_but_time(cluster: Any, run: Run, folder: Path, tmp_path: Path) -> None:
    """It has two of three processors, and most of what was done so far."""
    for number in range(8):
        for path in folder.iterdir():
            (tmp_path / f"{number}-{path.name}").symlink_to(path)
    building = ("footprint", "build", f"{tmp_path}/*.parquet", "-o")
    output, partials = tmp_path / "f", tmp_path / "f.partials"
    node = begun(lambda: cluster.add_node(num_cpus=2, object_store_memory=100 << 20))
    command = [*SUBPAGE, *building, str(output), "--ray", cluster.address]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: (partials.exists() and len(list(partials.iterdir())) >= 24) or running.poll() is not None)
        cluster.remove_node(node, allow_graceful=False)
        assert running.poll() is None and len(list(partials.iterdir())) < 96
        said = running.communicate(timeout=240)[1]
    finally:
        running.kill()
    assert running.returncode == 0, said
    run(*building, tmp_path / "g")
    assert output.read_bytes() == (tmp_path / "g").read_bytes()


def until(what: Callable[[], bool]) -> None:
    for _ in range(2400):
        if what():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_something_else_that_listens_is_no_cluster(run: Run, folder: Path, tmp_path: Path) -> None:
    address = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    done = run("footprint", "build", f"{folder}/*", "--ray", address, "-o", tmp_path / "f", status=1)
    assert f"--ray {address}: no cluster of Ray answers there: " in done.stderr
