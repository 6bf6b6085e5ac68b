"""The engine's kernels as numba keeps them: which there are, which call which, which are compiled already."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from numba.core.dispatcher import Dispatcher

# numba's type hints do not know what a dispatcher has, nor its own configuration.
Kernel = Any
_config: Any = numba.config


def kernels() -> set[Kernel]:
    """Every kernel of the engine's modules that are imported; none where they are plain Python."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("engine.")]
    found = {item for module in modules for item in vars(module).values() if isinstance(item, Dispatcher)}
    return {kernel for kernel in found if kernel.py_func.__module__.startswith("engine.")}


def reached(entries: Iterable[Kernel]) -> set[Kernel]:
    """These kernels and those that they call, by name, however deep."""
    todo = [entry for entry in entries if isinstance(entry, Dispatcher)]
    found: set[Kernel] = set(todo)
    while todo:
        more = set(_called(todo.pop().py_func)) - found
        found |= more
        todo += more
    return found


def _called(function: Any) -> Iterator[Kernel]:
    """What the code of a function names that is a kernel: a global, or an attribute of a module."""
    named: Any = None
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL":
            named = function.__globals__.get(instruction.argval)
        elif instruction.opname in {"LOAD_ATTR", "LOAD_METHOD"} and isinstance(named, ModuleType):
            named = getattr(named, instruction.argval, None)
        if isinstance(named, Dispatcher):
            yield named


def folder() -> Path:
    """Where compiled kernels are, named by the sources of all."""
    return Path(_config.CACHE_DIR)


def index(kernel: Kernel) -> Path:
    """The file that says which signatures of a kernel are compiled."""
    return Path(kernel._cache._cache_file._index_path)


def compiled(of: Iterable[Kernel]) -> int:
    """How many have code on disk."""
    return sum(index(kernel).exists() for kernel in of)


def files(of: Iterable[Kernel]) -> list[Path]:
    """What is on disk of these kernels: their indices and the code of each signature."""
    indices = sorted(path for path in map(index, of) if path.exists())
    return [file for path in indices for file in (path, *sorted(path.parent.glob(f"{path.stem}.*.nbc")))]


def take_turns(of: Iterable[Kernel]) -> None:
    """Let no two processes compile one kernel at a time: the second waits, and loads what the first has compiled.

    It also keeps their entries in the kernel's index, which numba writes anew for each. Calls among kernels make no
    circle, so processes that wait for each other cannot either.
    """
    for kernel in of:
        kernel.compile = _in_turn(kernel, kernel.compile)


def _in_turn(kernel: Kernel, compile_one: Callable[[Any], Any]) -> Callable[[Any], Any]:
    held = False

    def compile_in_turn(signature: Any) -> Any:
        nonlocal held
        if held or tuple(signature) in kernel.overloads:
            return compile_one(signature)
        lock = index(kernel).with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            flock(file, LOCK_EX)
            held = True
            try:
                return compile_one(signature)
            finally:
                held = False

    return compile_in_turn
