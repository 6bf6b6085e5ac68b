"""The plugin as a file that QEMU loads: the one that ``make plugin`` built, or one compiled for this user now."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from capture.errors import CaptureError

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("subpage_capture.c", "qemu_plugin_api.h", "ring.h"))
NAME = "subpage_capture.so"
FLAGS = ("-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


def digest() -> str:
    """Of the sources: objects of other sources are never taken for these."""
    found = hashlib.sha256()
    for path in SOURCES:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def cache() -> Path:
    """Where objects of this user are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "subpage" / "plugin"


def built() -> Path:
    """The plugin of these sources, compiled unless it was already. Raises CaptureError."""
    for folder in (HERE / "build", cache()):
        path = folder / digest() / NAME
        if path.exists():
            return path
    return build(cache() / digest() / NAME)


def build(path: Path) -> Path:
    """Compile the plugin to ``path``: a C compiler is all that it needs. Raises CaptureError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        rule = "the QEMU plugin must be compiled, and there is no C compiler: install gcc or clang, or set CC"
        raise CaptureError(rule)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*compiler.split(), *FLAGS, "-o", str(beside), str(SOURCES[0])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CaptureError(f"{compiler} could not compile the QEMU plugin:\n{done.stderr.strip()}")
        beside.replace(path)
    except OSError as error:
        raise CaptureError(f"{path}: the QEMU plugin cannot be built: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{build(HERE / 'build' / digest() / NAME)}\n")
