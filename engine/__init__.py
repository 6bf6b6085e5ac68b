"""The in-process model: EPT, SPPT and what KVM and Hyper-V do around them.

No HTTP, no files, no clock: the same input gives the same output. The one exception is this module, which tells
numba where compiled kernels are kept. numba's own cache looks only at the file of the cached function, so a change
to a rule that it calls in another module would silently bring the old answer back; the folder is therefore named
after all sources that kernels are made of, wherever they lie: a clone and an installed package share it.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parent

# What a kernel can depend on: the modules that have kernels, and all that these import. A test derives the list.
_KERNEL_SOURCES = (
    "__init__.py",
    "arch",
    "cpu",
    "errors.py",
    "footprint/__init__.py",
    "footprint/hits.py",
    "footprint/intervals.py",
    "footprint/kernels.py",
    "footprint/ordering.py",
    "jit",
    "kvm",
    "trace/__init__.py",
    "trace/guest_virtual.py",
    "trace/lines",
    "trace/lanes.py",
    "trace/object_hits.py",
    "trace/record_checks.py",
    "trace/refused.py",
    "trace/replay.py",
    "trace/results.py",
    "trace/scattered.py",
    "trace/served.py",
    "trace/serving.py",
    "trace/taken.py",
    "trace/translated.py",
    "trace/translations.py",
)


def kernel_sources(root: Path = _ROOT) -> list[Path]:
    """The files below ``root`` that a kernel can depend on, in a fixed order."""
    places = [root / name for name in _KERNEL_SOURCES]
    return sorted(file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place]))


def source_fingerprint(root: Path = _ROOT) -> str:
    """Hash of every source below ``root`` that a kernel can depend on: names and contents."""
    digest = hashlib.sha256()
    for path in kernel_sources(root):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _private(folder: Path) -> bool:
    """Make a folder and say whether it is ours alone: compiled code is loaded from it without further checks."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK)


def _kernel_cache() -> Path:
    configured = os.environ.get("SUBPAGE_KERNEL_CACHE")
    if configured:
        return Path(configured) / source_fingerprint()
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~").expanduser() / ".cache")
    shared = Path(tempfile.gettempdir()) / f"subpage-kernels-{os.getuid()}"
    for base in (Path(home) / "subpage" / "kernels", shared):
        if _private(base):
            return base / source_fingerprint()
    return Path(tempfile.mkdtemp(prefix="subpage-kernels-"))


def _point_numba_at(folder: Path) -> None:
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    # Vectorised table walks become gathers, which run 2.8 times slower than scalar code.
    os.environ.setdefault("NUMBA_LOOP_VECTORIZE", "0")
    os.environ.setdefault("NUMBA_SLP_VECTORIZE", "0")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(folder)


_point_numba_at(_kernel_cache())
