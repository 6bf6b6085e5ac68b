"""A service that hands footprints to a cluster: the job shows how far they are, and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from scale.cluster import cluster as connected
from service.runtime import handed_over
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.scale.traces import write
from tests.support.job_calls import ASYNC, ended
from tests.support.server import running
from tests.support.waiting import until

pytestmark = [pytest.mark.scale, pytest.mark.filterwarnings("default")]

PARQUET = "application/vnd.apache.parquet"
FILES = 40
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces that take some seconds."""
    made = tmp_path_factory.mktemp("traces")
    for number in range(FILES):
        write(made / f"{number:02}.parquet", number, 200_000 if number < FILES - 1 else 1000)
    return made


@pytest.fixture(scope="module")
def client(cluster: Any, folder: Path) -> Iterator[ContractClient]:
    """Of a service with a cluster."""
    settings = Settings(
        warm_up=False,
        store="memory",
        footprint_sources=(str(folder), "s3://traces/served"),
        ray_address=cluster.address,
    )
    with running(settings) as started:
        yield started.client


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that speak to the cluster."""
    begun: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            begun.append(self)

    monkeypatch.setattr(handed_over.subprocess, "Popen", Noted)
    return begun


def begin(client: ContractClient, *sources: str) -> str:
    reply = client.post("/v1/footprints:build", json={"sources": sources}, headers=ASYNC)
    assert reply.status_code == 202, reply.text
    return str(reply.headers["Location"])


def test_a_process_that_is_lost_fails_its_job_alone(
    client: ContractClient, folder: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    """As Ray itself ends it where its cluster is lost. Those behind it here show that nothing else was."""
    url = begin(client, f"{folder}/*.parquet")
    until(lambda: client.get(url).json()["records_done"] > 0, 240)
    os.kill(children[0].pid, signal.SIGKILL)
    job = ended(client, url)
    assert (job["state"], job["error"]["code"]) == ("failed", "cluster-unavailable")
    assert "was lost: the log of the service says more" in job["error"]["rule"]
    assert client.get("/livez").status_code == 200


def test_it_is_what_one_process_makes(
    client: ContractClient, run: Run, folder: Path, store: Callable[[str, bytes], None], tmp_path: Path
) -> None:
    for name in ("00.parquet", "01.parquet", "02.parquet"):
        store(f"served/{name}", (folder / name).read_bytes())
    sources = [f"{folder}/0[3-9].parquet", "s3://traces/served/*.parquet"]
    seen = []
    url = begin(client, *sources)
    until(lambda: seen.append(client.get(url).json()) or seen[-1]["state"] not in ("queued", "running"), 240)
    assert seen[-1]["state"] == "succeeded", seen[-1]
    done = [job["records_done"] for job in seen]
    assert done == sorted(done) and done[-1] == 10 * 200_000 and len(set(done)) > 2
    assert any(0 < job["progress"] < 1 and job["eta"] for job in seen)
    run("footprint", "build", *sources, "-o", tmp_path / "f")
    assert client.get(seen[-1]["result"], headers={"Accept": PARQUET}).content == (tmp_path / "f").read_bytes()


def test_a_job_that_is_cancelled_ends_on_the_cluster(
    client: ContractClient, cluster: Any, folder: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    url = begin(client, f"{folder}/*.parquet")
    until(lambda: client.get(url).json()["records_done"] > 0, 240)
    job = client.post(f"{url}:cancel").json()
    assert job["state"] == "cancelled" and 0 < job["records_done"] < (FILES - 1) * 200_000
    (child,) = children
    assert child.poll() is not None
    with connected(cluster.address) as ray:
        until(lambda: bool(ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]), 60)


def test_a_file_that_is_no_trace_is_told_by_the_job(client: ContractClient, folder: Path) -> None:
    (folder / "bad.log").write_text("S 1000,8 and more\n")
    job = ended(client, begin(client, f"{folder}/39.parquet", f"{folder}/bad.log"))
    (folder / "bad.log").unlink()
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-trace")
    assert f"{folder}/bad.log: " in job["error"]["rule"]
