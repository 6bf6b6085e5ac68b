"""What an installation makes depends on the lock: not on the age of pip, nor on what has been released since."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.install import for_uv

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "deploy" / "install.py"
LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))
PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()

# Those that came with Python 3.11.0, 3.11.2 (Debian 12) and 3.11.7, and the newest.
PIPS = ["pip==22.3", "pip==23.0.1", "pip==23.2.1", "pip"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> list[Requirement]:
    """What ``lock`` pins on this machine."""
    lines = re.findall(r"^([a-zA-Z0-9].*?) *\\$", lock.read_text(encoding="utf-8"), re.MULTILINE)
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def versions(lock: Path) -> dict[str, str]:
    return {normal(one.name): str(one.specifier).removeprefix("==") for one in locked(lock)}


def wheel(folder: Path, name: str, version: str, *metadata: str) -> str:
    """Write a wheel without code; returns its hash as a lock has it."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        "METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *metadata, ""]),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        record = ""
        for file, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{stem}.dist-info/{file},sha256={digest},{len(text)}\n"
            archive.writestr(f"{stem}.dist-info/{file}", text)
        archive.writestr(f"{stem}.dist-info/RECORD", f"{record}{stem}.dist-info/RECORD,,\n")
    return f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False)


def installed(python: Path) -> dict[str, str]:
    """Name and version of all that is in an environment, but for what installs."""
    program = (
        "import json, importlib.metadata as m; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    )
    done = run(python, "-I", "-c", program)
    return {normal(name): version for name, version in json.loads(done.stdout) if name not in ("pip", "uv")}


@pytest.mark.parametrize("name", LOCKS)
def test_everything_is_pinned_by_hash(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    entries = re.findall(r"^[a-zA-Z0-9].*?(?=^[a-zA-Z0-9]|\Z)", text, re.MULTILINE | re.DOTALL)
    assert entries and len(versions(ROOT / name)) == len(locked(ROOT / name))
    for entry in entries:
        assert re.match(r"\S+==\S+ (; .+ )?\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_extra_that_is_asked_for_is_in_the_lock(name: str) -> None:
    """Older pips (23.2.1 is one) look up ``coverage[toml]`` anew where the lock has ``coverage`` alone."""
    pinned = {(normal(one.name), frozenset(one.extras)) for one in locked(ROOT / name)}
    present = {normal(one.name): one for one in importlib.metadata.distributions()}
    for one in [*locked(ROOT / name), Requirement("subpage")]:
        asked = [Requirement(line) for line in present[normal(one.name)].requires or []]
        for needed in asked:
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *one.extras))
            if wanted and needed.extras:
                assert (normal(needed.name), frozenset(needed.extras)) in pinned, f"{one.name} asks for {needed}"


def test_development_only_adds() -> None:
    assert versions(ROOT / "requirements.lock").items() <= versions(ROOT / "requirements-dev.lock").items()
    assert versions(ROOT / "requirements-dev.lock").items() <= versions(ROOT / "requirements-scale.lock").items()


LISTED = [
    "global.index-url='https://a.test/simple'",
    "global.extra-index-url='\\nhttps://b.test/simple\\nhttps://c.test/simple'",
    "install.index-url='https://d.test/simple'",
    "global.constraint='/etc/constraints.txt'",
    "WARNING: something else",
]


@pytest.mark.parametrize(
    ("listed", "given", "expected"),
    [
        ([], {}, {}),
        (LISTED[:1], {}, {"UV_DEFAULT_INDEX": "https://a.test/simple"}),
        (LISTED[1:2], {}, {"UV_INDEX": "https://b.test/simple https://c.test/simple"}),
        (LISTED, {"UV_INDEX": "e"}, {"UV_DEFAULT_INDEX": "https://d.test/simple", "UV_INDEX": "e"}),
        ([":env:.index-url='e'", *LISTED[:1]], {}, {"UV_DEFAULT_INDEX": "e"}),
        (["global.find-links='/a /b'", "global.timeout='9'"], {}, {"UV_FIND_LINKS": "/a,/b", "UV_HTTP_TIMEOUT": "9"}),
        (["global.trusted-host='a b'", "global.cert='/c'"], {}, {"UV_INSECURE_HOST": "a b", "SSL_CERT_FILE": "/c"}),
    ],
)
def test_uv_is_told_what_pip_is(listed: list[str], given: dict[str, str], expected: dict[str, str]) -> None:
    always = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    assert for_uv(listed, given) == always | expected


def test_outside_of_an_environment() -> None:
    done = run(PYTHON, INSTALL, ROOT / "requirements.lock")
    assert done.returncode == 2 and "virtual environment" in done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the pip that this Python brings; returns its interpreter."""
    folder = tmp_path_factory.mktemp("installed")
    made = run(PYTHON, "-m", "venv", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "bin" / "python"


def test_without_uv_and_beside_newer_releases(environment: Path, tmp_path: Path) -> None:
    """An index that has no uv: pip does it, and takes the version of the lock, extra and all."""
    lib = wheel(tmp_path, "locked-lib", "1.0", "Provides-Extra: more")
    wheel(tmp_path, "locked-lib", "99.0", "Provides-Extra: more")
    tool = wheel(tmp_path, "locked-tool", "1.0", "Requires-Dist: locked-lib[more]>=1.0")
    lock = tmp_path / "some.lock"
    lock.write_text(f"locked-lib==1.0 \\\n    {lib}\nlocked-tool==1.0 \\\n    {tool}\n")
    only_here = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_USER": "1"}
    done = run(environment, INSTALL, lock, **only_here)
    assert done.returncode == 0 and "pip installs the same files" in done.stderr, done.stderr
    found = installed(environment)
    assert (found["locked-lib"], found["locked-tool"]) == ("1.0", "1.0")
    # Not what was locked: refused by its hash
    wheel(tmp_path, "locked-lib", "1.0", "Provides-Extra: other")
    assert run(environment, "-m", "pip", "uninstall", "--yes", "locked-lib").returncode == 0
    done = run(environment, INSTALL, lock, **only_here)
    assert done.returncode == 1 and "DO NOT MATCH THE HASHES" in done.stderr and "Could not install" in done.stderr


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a newer release of everything that is locked."""
    folder = tmp_path_factory.mktemp("newer")
    for name in versions(ROOT / "requirements-dev.lock"):
        wheel(folder, name, "999.0")
    return folder


@pytest.fixture(scope="module", params=PIPS)
def aged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment with a pip of some age."""
    if sys.version_info >= (3, 12) and request.param in PIPS[:2]:
        pytest.skip(f"{request.param} does not run on this Python: make install-test PYTHON=python3.11")
    folder = tmp_path_factory.mktemp("aged")
    for command in (
        [PYTHON, "-m", "venv", folder],
        [folder / "bin/python", "-m", "pip", "install", "-U", request.param],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin" / "python"


@pytest.mark.install
@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_any_pip_beside_newer_releases(aged: Path, newer: Path, tmp_path: Path, name: str) -> None:
    pinned, sight = versions(ROOT / name), {"PIP_FIND_LINKS": str(newer)}
    # As a person would, from the lock
    report = tmp_path / "report.json"
    plain = [aged, "-m", "pip", "install", "--require-hashes", "-r", ROOT / name]
    done = run(*plain, "--dry-run", "--ignore-installed", "--report", report, **sight)
    assert done.returncode == 0, done.stderr
    metadata = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    assert {normal(one["name"]): one["version"] for one in metadata} == pinned
    # As make does
    done = run(aged, INSTALL, ROOT / name, **sight)
    assert done.returncode == 0 and "pip installs the same files" not in done.stderr, done.stderr
    assert installed(aged) == pinned
