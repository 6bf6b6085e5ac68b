"""openapi-typescript: the types are whole, and a program that does the main job is held to them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from service.settings import Settings
from tests.clients import TOKEN
from tests.contract.client import CONTRACT
from tests.support.server import running

HERE = Path(__file__).parent / "node"
MODULES = Path(__file__).parents[2] / "build" / "node" / "node_modules"
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(
    NODE is None or not (MODULES / ".bin" / "tsc").exists(),
    reason="node or the packages of tests/clients/node are not installed: make contract-tools",
)


def called(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_main_job(tmp_path: Path, parquet: Path) -> None:
    for name in ("package.json", "tsconfig.json", "generate.mjs", "node.d.ts", "drive.ts"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(MODULES)
    called(str(NODE), "generate.mjs", CONTRACT, "subpage.d.ts", cwd=tmp_path)
    called(MODULES / ".bin" / "tsc", "-p", ".", cwd=tmp_path)
    with running(Settings(warm_up=False, token=TOKEN)) as service:  # type: ignore[arg-type]
        said = called(str(NODE), "out/drive.js", service.url, TOKEN, parquet, cwd=tmp_path)
    assert json.loads(said) == {"records": 4, "violations": 2, "page": 3}
