"""The client alone: its wheel in an environment that has httpx2 and websockets, and nothing of the service."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.client.stub import Answer, stub

ROOT = Path(__file__).parents[2]
# What it needs, with what that needs.
NEEDED = ("httpx2", "httpcore2", "h11", "anyio", "idna", "truststore", "typing_extensions", "websockets")
MOST_BYTES = 30 << 20  # of an environment with it


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of packages of that environment."""
    folder = tmp_path_factory.mktemp("client")
    shutil.copytree(ROOT / "client", folder / "sources", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    sources = folder / "sources"
    subprocess.run([sys.executable, "-P", "-c", build], cwd=sources, capture_output=True, timeout=300, check=True)
    (wheel,) = folder.glob("subpage_client-*.whl")
    venv.create(folder / "environment", with_pip=False)
    site = next((folder / "environment").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    installed = Path(sysconfig.get_path("purelib"))
    for name in NEEDED:
        for file in distribution(name).files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and (installed / file).exists():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(installed / file, site / file)
    return site


def test_it_runs_without_the_service(site: Path) -> None:
    program = """
import subpage, sys
with subpage.Client(sys.argv[1]) as client:
    print([vm.name for vm in client.vms()], sorted({"numpy", "pyarrow", "engine", "service"} & set(sys.modules)))
"""
    with stub(Answer(document={"vms": [{"id": "vm_1", "name": "guest"}], "next": None})) as server:
        python = site.parents[2] / "bin" / "python"
        done = subprocess.run(
            [str(python), "-I", "-W", "error", "-c", program, server.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.stdout.strip(), done.stderr) == ("['guest'] []", "")


def test_it_is_small(site: Path) -> None:
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < MOST_BYTES


def test_it_holds_what_is_kept(site: Path) -> None:
    kept = {path.name for path in (ROOT / "client" / "subpage").iterdir() if path.is_file()}
    assert {path.name for path in (site / "subpage").iterdir() if path.is_file()} == kept
