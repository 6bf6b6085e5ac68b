"""The package as people install it: a wheel, in an environment of its own, far from the sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import recorded

ROOT = Path(__file__).parents[2]
SOURCES = ("capture", "client", "engine", "scale", "service", "pyproject.toml", "README.md", "LICENSE")


class Installed:
    """An environment with the wheel; its dependencies, and what builds, are those of the tests."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "elsewhere"
        self.home.mkdir()
        self._bin = folder / "environment" / "bin"
        venv.create(folder / "environment", with_pip=True)
        self.packages = Path(self.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # Only the folder: the .pth files in it, which lead to the sources, are not followed.
        (self.packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        sources = folder / "sources"
        sources.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, sources / name)
        # What pip does with the sources, with setuptools alone.
        build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
        subprocess.run([sys.executable, "-P", "-c", build], cwd=sources, capture_output=True, timeout=600, check=True)
        (self.wheel,) = folder.glob("*.whl")
        shutil.rmtree(sources)
        offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
        self.run("pip", "install", *offline, str(self.wheel))

    def run(self, command: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        words = [str(self._bin / command), *arguments]
        done = subprocess.run(
            words, cwd=self.home, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_it_holds_what_runs_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"capture", "engine", "scale", "service", "subpage"}
    kept = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "capture",
            "engine",
            "scale",
            "service",
            "client/subpage",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(names) == sorted(
        name.removeprefix("client/") for name in kept.stdout.split() if (ROOT / name).exists()
    )


def test_it_says_where_it_is(installed: Installed) -> None:
    (installed.home / "service").mkdir()  # another thing of that name in the current folder is not in the way
    (installed.home / "service" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    assert installed.run("subpage", "--version").startswith("subpage ")
    where = installed.run("python", "-P", "-c", "import engine, service; print(engine.__file__, service.__file__)")
    assert all(Path(file).is_relative_to(installed.packages) for file in where.split())


@pytest.mark.jit
def test_the_demonstration_reports_the_same(installed: Installed) -> None:
    truth = json.loads(recorded.TRUTH.read_text(encoding="utf-8"))["kernel_control_data"]["boot.parquet"]
    data = installed.packages / "service" / "data"
    trace, policy = data / "traces" / "boot.parquet", data / "policies" / "kernel_control_data.json"
    demo: dict[str, Any] = json.loads(installed.run("subpage", "demo", "--json"))
    replay = json.loads(installed.run("subpage", "replay", str(trace), "--policy", str(policy), "--json"))
    assert demo["trace"] == str(trace)
    for name in ("records", "violations", "page_granular_violations"):
        assert demo[name] == replay[name] == truth[name]
    hits = {item["name"]: (item["violations"], item["collateral"]) for item in demo["objects"] if item["violations"]}
    assert hits == {name: (hit["violations"], hit["collateral"]) for name, hit in truth["by_object"].items()}
