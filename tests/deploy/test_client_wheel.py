"""The client alone: its wheel in an environment that has httpx2 and websockets, and nothing of the service."""

from __future__ import annotations

import re
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
from tests.support.server import running

ROOT = Path(__file__).parents[2]
# What it needs, with what that needs.
NEEDED = ("httpx2", "httpcore2", "h11", "anyio", "idna", "truststore", "typing_extensions", "websockets")
MOST_BYTES = 30 << 20  # of an environment with it
MOST_WHEEL_BYTES = 64 << 10
ATTACHES = """
import sys, subpage
with subpage.Client(sys.argv[1]) as client:
    vm = client.create_vm("guest", memory="16MiB")
    vm.protect([{"name": "table", "gpa": 0x2000, "size": 256}], name="kernel")
    with vm.attach(lambda question: "allow" if question.objects == ["table"] else "skip") as tool:
        print(vm.access(0x2000, on_violation="ask")["landed"], tool.answered)
    vm.delete()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("client")
    shutil.copytree(ROOT / "client", folder / "sources", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    sources = folder / "sources"
    subprocess.run([sys.executable, "-P", "-c", build], cwd=sources, capture_output=True, timeout=300, check=True)
    (wheel,) = folder.glob("subpage_client-*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The folder of packages of that environment."""
    folder = wheel.parent
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


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small(site: Path, wheel: Path) -> None:
    assert size(site) < MOST_BYTES and wheel.stat().st_size < MOST_WHEEL_BYTES


def test_ten_lines_attach_a_tool_and_answer(site: Path) -> None:
    python = site.parents[2] / "bin" / "python"
    with running() as service:
        done = subprocess.run(
            [str(python), "-I", "-W", "error", "-c", ATTACHES, service.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.stdout, done.stderr) == ("True 1\n", "")


@pytest.mark.install
def test_pip_installs_it_and_what_it_needs(wheel: Path, tmp_path: Path) -> None:
    """From the package index, in an empty environment: what is copied above is what it needs, and no more."""
    venv.create(tmp_path, with_pip=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    without = size(site)
    pip = (str(tmp_path / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    subprocess.run([*pip, str(wheel)], check=True, timeout=600)
    assert size(site) - without < MOST_BYTES
    installed = {re.split(r"[-.]", file.name)[0].lower() for file in site.glob("*.dist-info")} - {"pip", "setuptools"}
    assert installed == {*(name.lower() for name in NEEDED), "subpage_client"}


def test_it_holds_what_is_kept(site: Path) -> None:
    kept = {path.name for path in (ROOT / "client" / "subpage").iterdir() if path.is_file()}
    assert {path.name for path in (site / "subpage").iterdir() if path.is_file()} == kept
