"""Whether the code of all kernels is on disk, and how it comes there."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from pathlib import Path
from typing import Any, Literal

import numba
from numba.core.registry import cpu_target

from engine.warm.kernels import files, folder, kernels, reached
from engine.warm.lean import give_back, load_lean
from engine.warm.processes import Report, compile_in_processes, silent
from engine.warm.steps import ALL, FIRST, FIRST_KERNELS

Group = Literal["first", "all"]

_STEPS = {"first": FIRST, "all": ALL}

# numba's type hints do not know its configuration.
_config: Any = numba.config


def compile_kernels(
    group: Group, report: Report = silent, *, processes: int | None = None, gone: threading.Event | None = None
) -> None:
    """Compile, in processes, what is not compiled yet: all that a service can reach, or first what the main job calls.

    ``gone`` gives up. Raises CompilerEnded.
    """
    if is_compiled(group):
        return
    wanted = kernels() if group == "all" else reached(FIRST_KERNELS)
    compile_in_processes(_STEPS[group], wanted, report, processes=processes, gone=gone)
    if gone is None or not gone.is_set():
        names = [str(file.relative_to(folder())) for file in files(wanted)]
        _note(group).write_text(json.dumps(names), encoding="utf-8")


def load_kernels(group: Group) -> None:
    """Load a group, and nothing that only a compiler needs; what is not compiled yet is compiled here."""
    load_lean(kernels())
    for step in _STEPS[group].values():
        step()
    give_back()


def is_compiled(group: Group) -> bool:
    """Whether nothing of a group must be compiled any more: never without a JIT."""
    if _config.DISABLE_JIT:
        return True
    return _is_there(group) or (group == "first" and _is_there("all"))


def _is_there(group: Group) -> bool:
    try:
        noted = json.loads(_note(group).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((folder() / name).exists() for name in noted)


def _note(group: Group) -> Path:
    """Where it is noted which files a group has, for code of this processor from this compiler."""
    codegen = cpu_target.target_context.codegen()
    compiler = (platform.python_version(), numba.__version__, codegen.magic_tuple())
    return folder() / f"{group}-{hashlib.sha256(repr(compiler).encode()).hexdigest()[:16]}.json"
