"""A Dockerfile carried out without a container engine: its steps run one by one, with an ordinary folder as the root.

Paths of the recipe are looked for below that folder, and what a base image would bring is the machine's own: a Python,
a shell and the usual tools. Accounts are not made; what the recipe gives to its user belongs to that number where the
tests run as root, and its user runs what comes after USER.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# Places of the recipe; everything else in a command is the machine's.
PLACES = ("/opt/subpage", "/var/lib/subpage", "/var/cache/subpage")

# Stand-ins for what changes accounts: the owner is set by number, which needs no account.
_USERADD = "#!/bin/sh\nexit 0\n"
_INSTALL = """\
#!/bin/sh
owner=
while [ "$1" = -o ] || [ "$1" = -g ] || [ "$1" = -d ] || [ "$1" = -m ]; do
    case $1 in
        -o) owner=$2; shift 2 ;;
        -g) shift 2 ;;
        -m) mode=$2; shift 2 ;;
        -d) shift ;;
    esac
done
mkdir -p "$1" && chmod "${mode:-0755}" "$1" && { [ -z "$owner" ] || [ "$(id -u)" != 0 ] || chown 10001:10001 "$1"; }
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


_PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()

# A base image has its Python where everybody can run it. Where this one is in somebody's home, the image's user may
# read, and still not write, what is not theirs.
_READS = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def _reachable(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))


class Image:
    """What a recipe makes. ``folder`` must be one that every user may enter; the root of the image is inside."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._stages = folder / "stages"
        self._tools = folder / "tools"
        self._tools.mkdir()
        for name, text in (("useradd", _USERADD), ("install", _INSTALL)):
            (self._tools / name).write_text(text)
            (self._tools / name).chmod(0o755)
        (self._tools / "python").symlink_to(_PYTHON)
        self._stage = ""
        self.environment: dict[str, str] = {}
        self.workdir = "/"
        self.user = ""
        self.command: list[str] = []
        self.health: list[str] = []
        self.volumes: list[str] = []

    def build(self, recipe: str) -> None:
        """Carry out every step. Raises RuntimeError with the output of one that fails."""
        for name, arguments in instructions(recipe):
            getattr(self, f"_{name.lower()}")(arguments)

    def located(self, text: str) -> str:
        """``text`` with the places of the recipe where they are on this machine."""
        for place in PLACES:
            text = text.replace(place, f"{self.root}{place}")
        return text

    def invocation(self, command: list[str], **environment: str) -> dict[str, Any]:
        """Arguments for subprocess: ``command`` as a container would run it."""
        given = {name: self.located(value) for name, value in (self.environment | environment).items()}
        path = given.pop("PATH", "$PATH").replace("$PATH", f"{self._tools}:/usr/local/bin:/usr/bin:/bin")
        temporary = self.root / "tmp"
        if self.user and os.geteuid() == 0:
            become = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
            command = [*become, *([] if _reachable(_PYTHON) else _READS), "--", *command]
        return {
            "args": [self.located(word) for word in command],
            "cwd": f"{self.root}{self.workdir}",
            "env": {"PATH": path, "HOME": "/nonexistent", "TMPDIR": str(temporary), **_network(), **given},
        }

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            **self.invocation(command, **environment), capture_output=True, text=True, check=False, timeout=1800
        )

    # One for each instruction

    def _from(self, arguments: str) -> None:
        if self.root.exists():
            self._stages.mkdir(exist_ok=True)
            self.root.rename(self._stages / self._stage)
        self._stage = arguments.rpartition(" AS ")[2] if " AS " in arguments else "final"
        self.environment, self.workdir, self.user = {}, "/", ""
        for place in ("tmp", *(place.lstrip("/").rpartition("/")[0] for place in PLACES)):
            (self.root / place).mkdir(parents=True, exist_ok=True)
        (self.root / "tmp").chmod(0o1777)

    def _env(self, arguments: str) -> None:
        for word in shlex.split(arguments):
            name, _, value = word.partition("=")
            self.environment[name] = value

    def _workdir(self, arguments: str) -> None:
        self.workdir = arguments
        (self.root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, arguments: str) -> None:
        words = arguments.split()
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
        *sources, target = words
        into = Path(f"{self.root}{target}") if target.startswith("/") else self.root / self.workdir.lstrip("/") / target
        for source in sources:
            origin = self._stages / stage / source.lstrip("/") if stage else ROOT / source
            if origin.is_dir():
                shutil.copytree(origin, into, symlinks=True, dirs_exist_ok=True, ignore=None if stage else _IGNORED)
            else:
                (into if target.endswith("/") else into.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, into / origin.name if target.endswith("/") else into)

    def _run(self, arguments: str) -> None:
        done = self.run(["sh", "-c", arguments])
        if done.returncode:
            raise RuntimeError(f"RUN {arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

    def _user(self, arguments: str) -> None:
        self.user = arguments

    def _volume(self, arguments: str) -> None:
        self.volumes = json.loads(arguments)

    def _healthcheck(self, arguments: str) -> None:
        self.health = json.loads(arguments.partition(" CMD ")[2])

    def _cmd(self, arguments: str) -> None:
        self.command = json.loads(arguments)

    def _label(self, arguments: str) -> None:
        """Says something; does nothing."""

    _expose = _label


_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


def _network() -> Mapping[str, str]:
    """How this machine reaches its package index: an image is built with what its builder has set up."""
    known = (
        "PIP_",
        "UV_",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "SSL_CERT",
    )
    return {name: value for name, value in os.environ.items() if name.startswith(known)}
