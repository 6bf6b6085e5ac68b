"""QEMU's plugin execlog, which no package of Debian has: compiled from the source of the QEMU that is installed.

The source comes from where its package did, checked by apt, and stays outside the repository. The steps are those of
docs/your-own-guest.md.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILDABLE = all(map(shutil.which, ("gcc", "pkg-config", "apt-get", "dpkg-query", "dpkg-source")))
_ROOT = Path(__file__).parents[2]
_SOURCES = ("*/contrib/plugins/execlog.c", "*/include/qemu/qemu-plugin.h")


class SourceError(Exception):
    """The source is not to be had here."""


def execlog() -> Path:
    """The plugin for this version of QEMU, made unless it is there. Raises SourceError."""
    names = ["-f", "${source:Package} ${source:Version}", "qemu-system-x86"]
    package, version = _run(["dpkg-query", "-W", *names]).split()
    plugin = _ROOT / "build" / "execlog" / version / "libexeclog.so"
    if not plugin.exists():
        with tempfile.TemporaryDirectory() as folder:
            made = _made(Path(folder), f"{package}={version}")
            plugin.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, plugin.with_suffix(".new"))
        plugin.with_suffix(".new").replace(plugin)
    return plugin


def _made(folder: Path, source: str) -> Path:
    """Lists of sources of its own, of the mirrors that packages come from: those of the machine stay as they are."""
    folder.chmod(0o755)
    shown = ["--format", "deb-src $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    mirrors = _run(["apt-get", "indextargets", *shown]).splitlines()
    (folder / "sources.list").write_text("".join(f"{line}\n" for line in sorted(set(mirrors))))
    (folder / "lists" / "partial").mkdir(parents=True)
    places = {"Etc::sourcelist": "sources.list", "Etc::sourceparts": "none", "State::Lists": "lists", "Cache": "cache"}
    apt = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "APT::Sandbox::User="]
    for name, value in places.items():
        apt += ["-o", f"Dir::{name}={folder / value}"]
    _run([*apt, "update"], folder)
    _run([*apt, "source", "--download-only", "--tar-only", source], folder)
    (archive,) = folder.glob("*.orig.tar.*")
    _run(["tar", "-xf", archive.name, "--wildcards", "--strip-components=1", *_SOURCES], folder)
    glib = _run(["pkg-config", "--cflags", "glib-2.0"]).split()
    made = folder / "libexeclog.so"
    _run(
        ["gcc", "-O2", "-shared", "-fPIC", "-Iinclude/qemu", *glib, "-o", made.name, "contrib/plugins/execlog.c"],
        folder,
    )
    return made


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=True)
    except subprocess.CalledProcessError as error:
        raise SourceError(f"{' '.join(command[:1])}: {error.stderr.strip()[-300:]}") from None
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{command[0]} did not end within {error.timeout} s") from None
    return done.stdout
