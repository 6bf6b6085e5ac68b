"""The in-process model: EPT, SPPT and what KVM and Hyper-V do around them.

No HTTP, no files, no clock: the same input gives the same output. The one exception is this module, which tells
numba where compiled kernels are kept. numba's own cache looks only at the file of the cached function, so a change
to a rule that it calls in another module would silently bring the old answer back; the folder is therefore named
after every source of the package.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parent


def source_fingerprint(root: Path = _ROOT) -> str:
    """Hash of every Python source below ``root``: names and contents, in a fixed order."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kernel_cache() -> Path:
    configured = os.environ.get("SUBPAGE_KERNEL_CACHE")
    if configured:
        return Path(configured) / source_fingerprint()
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~").expanduser() / ".cache")
    base = Path(home) / "subpage" / "kernels"
    try:
        base.mkdir(parents=True, exist_ok=True)
        usable = os.access(base, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        base = Path(tempfile.gettempdir()) / f"subpage-kernels-{os.getuid()}"
    return base / source_fingerprint()


def _point_numba_at(folder: Path) -> None:
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    # Vectorised table walks become gathers, which run 2.8 times slower than scalar code.
    os.environ.setdefault("NUMBA_LOOP_VECTORIZE", "0")
    os.environ.setdefault("NUMBA_SLP_VECTORIZE", "0")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(folder)


_point_numba_at(_kernel_cache())
