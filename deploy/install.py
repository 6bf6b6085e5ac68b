"""Make the environment that runs this hold what a lock pins: no other versions, nothing beside them.

    .venv/bin/python deploy/install.py requirements.lock --editable .

``requirements-installer.lock`` pins one wheel, uv. The environment's own pip, of whatever age, takes that by its hash,
and uv takes the rest, and then the package itself if arguments for it follow. Nobody resolves anything: what is not in
the lock is not installed, so neither the age of pip nor what has been released since makes a difference. Where uv is
not to be had, or cannot reach the index in the way pip can, pip installs the same files, only slower (ADR 10).
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

INSTALLER = Path(__file__).parents[1] / "requirements-installer.lock"
PIP = [sys.executable, "-m", "pip"]
UV = [str(Path(sysconfig.get_path("scripts"), "uv")), "pip"]

FROM_LOCK = ["--quiet", "--require-hashes"]
PACKAGE = ["install", "--quiet", "--no-deps", "--no-build-isolation"]

# How pip is told to reach an index, and how uv is. Several values are separated by the third, by blanks for pip.
SETTINGS = (
    ("index-url", "UV_DEFAULT_INDEX", None),
    ("extra-index-url", "UV_INDEX", " "),
    ("find-links", "UV_FIND_LINKS", ","),
    ("trusted-host", "UV_INSECURE_HOST", " "),
    ("proxy", "ALL_PROXY", None),
    ("cert", "SSL_CERT_FILE", None),
    ("client-cert", "SSL_CLIENT_CERT", None),
    ("default-timeout", "UV_HTTP_TIMEOUT", None),
    ("timeout", "UV_HTTP_TIMEOUT", None),
)

# Settings of a person's pip that would put what is installed elsewhere, or refuse to.
UNWANTED = ("PIP_CONSTRAINT", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PIP_ROOT", "PIP_TARGET", "PIP_USER")


def for_uv(listed: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """``given``, an environment, with the lines of ``pip config list`` in uv's words. What it has for uv already stays.

    Any index may have a file: its hash says whether it is the one, so the order of them means nothing.
    """
    values: dict[str, str] = {}
    lines = [re.fullmatch(r"(global|install|:env:)\.([a-z-]+)=(.*)", line.strip()) for line in listed]
    for section in ("global", "install", ":env:"):  # as they prevail
        values |= {line[2]: str(ast.literal_eval(line[3])) for line in lines if line and line[1] == section}
    words = {
        variable: values[name].strip() if separator is None else separator.join(values[name].split())
        for name, variable, separator in SETTINGS
        if values.get(name)
    }
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"} | words | dict(given)


def succeeds(command: list[str], environment: Mapping[str, str]) -> bool:
    """Whether ``command`` ran and ended well. What it says goes to the terminal."""
    try:
        return subprocess.run(command, env=environment, check=False, stdout=sys.stderr).returncode == 0
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return False


def has_uv(environment: Mapping[str, str]) -> bool:
    """Whether the pinned uv is here, or pip could install it."""
    pinned = re.search(r"^uv==(\S+)", INSTALLER.read_text(encoding="utf-8"), re.MULTILINE)
    found = [one.version for one in importlib.metadata.distributions(name="uv")]
    install = [*PIP, "install", *FROM_LOCK, "--no-deps", "--no-compile", "--only-binary=:all:", "-r", str(INSTALLER)]
    return (pinned is not None and found == [pinned[1]]) or succeeds(install, environment)


def by_uv(lock: str, package: list[str], environment: Mapping[str, str]) -> bool:
    """Install with uv, and see that what is here is complete."""
    listed = subprocess.run([*PIP, "config", "list"], env=environment, check=False, capture_output=True, text=True)
    environment = for_uv(listed.stdout.splitlines(), environment)
    here = ["--python", sys.executable]
    return (
        succeeds([*UV, "sync", *here, *FROM_LOCK, "--no-build", lock], environment)
        and (not package or succeeds([*UV, *PACKAGE, *here, *package], environment))
        and succeeds([*UV, "check", "--quiet", *here], environment)
    )


def by_pip(lock: str, package: list[str], environment: Mapping[str, str]) -> bool:
    """The same with pip: not resolving, it looks up nothing that the lock does not name."""
    return (
        succeeds([*PIP, "install", *FROM_LOCK, "--no-deps", "--only-binary=:all:", "-r", lock], environment)
        and (not package or succeeds([*PIP, *PACKAGE, *package], environment))
        and succeeds([*PIP, "check"], environment)
    )


def main(lock: str, *package: str) -> int:
    if sys.prefix == sys.base_prefix:
        print("Run this with the Python of a virtual environment: everything else in it is removed.", file=sys.stderr)
        return 2
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if has_uv(environment) and by_uv(lock, [*package], environment):
        return 0
    print("uv did not manage; pip installs the same files, which takes longer.", file=sys.stderr)
    if by_pip(lock, [*package], environment):
        return 0
    print(
        f"Could not install what {lock} pins: the reason is above. A mirror of the package index is taken from pip's "
        "settings (pip config set global.index-url URL, or PIP_INDEX_URL).",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
