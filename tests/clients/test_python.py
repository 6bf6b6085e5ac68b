"""openapi-python-client: the client is whole, typed, and does the main job."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from service.settings import Settings
from tests.clients import TOKEN
from tests.contract.client import CONTRACT
from tests.support.server import running

HERE = Path(__file__).parent / "python"
TOOLS = Path(__file__).parents[2] / "build" / "clients" / "bin"

pytestmark = pytest.mark.skipif(
    not (TOOLS / "openapi-python-client").exists(), reason="the generator is not installed: make contract-tools"
)


def called(*command: str | Path, cwd: Path) -> str:
    # Of this environment nothing: the client has its own.
    environment = {"PATH": f"{TOOLS}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the client and the program that uses it, and what the generator said."""
    folder = tmp_path_factory.mktemp("client")
    said = called(
        *(TOOLS / "openapi-python-client", "generate", "--path", CONTRACT, "--config", HERE / "config.yaml"),
        *("--output-path", "subpage_client", "--meta", "none"),
        cwd=folder,
    )
    (folder / "drive.py").write_bytes((HERE / "drive.py").read_bytes())
    return folder, said


def test_nothing_is_missing(generated: tuple[Path, str]) -> None:
    folder, said = generated
    assert [word for word in ("WARNING", "ERROR", "Unable to", "Invalid", "Unsupported") if word in said] == [], said
    operations = sum(len(item) for item in json.loads(CONTRACT.read_text(encoding="utf-8"))["paths"].values())
    modules = [path for path in (folder / "subpage_client" / "api").glob("*/*.py") if path.name != "__init__.py"]
    assert len(modules) == operations


def test_types(generated: tuple[Path, str]) -> None:
    said = called(TOOLS / "mypy", "--config-file", HERE / "mypy.ini", "drive.py", cwd=generated[0])
    assert "Success: no issues found" in said


def test_main_job(generated: tuple[Path, str], parquet: Path) -> None:
    with running(Settings(warm_up=False, token=TOKEN)) as service:  # type: ignore[arg-type]
        said = called(TOOLS / "python", "drive.py", service.url, TOKEN, parquet, cwd=generated[0])
    assert json.loads(said) == {"records": 4, "violations": 2, "page": 3}
