"""The examples of the docstrings, run against a service; every method has one."""

from __future__ import annotations

import asyncio
import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import subpage
from subpage import bitmaps, client, compacting, errors, footprints, jobs, machines, policies, traces, values
from subpage.modes import Method

# In this order: the examples of one class build on each other, and a trace is made by those of machines.
MODULES = (subpage, client, bitmaps, policies, values, machines, compacting, traces, jobs, footprints, errors)
# Without an example of their own: what needs a library that is optional.
WITHOUT = {"pandas", "polars"}


def examples_of(text: str) -> str:
    """A docstring with the example that its sentence has, ``vm.name`` is ``'example'``, as a session."""
    found = re.search(r"``([^`]*\b(?:client|trace|vm)\.\w+\([^`]*)``(?:\s+is\s+``([^`]*)``)?", text)
    return f">>> {found[1]}\n{found[2] or ''}\n" if found and ">>>" not in text else text


def documented(module: ModuleType) -> list[tuple[str, str]]:
    """Name and docstring of everything that a module defines, in order."""
    found = [(module.__name__, module.__doc__ or "")]
    for name, item in vars(module).items():
        if getattr(item, "__module__", None) == module.__name__ and (inspect.isclass(item) or inspect.isfunction(item)):
            found.append((f"{module.__name__}.{name}", item.__doc__ or ""))
            for method, value in vars(item).items() if inspect.isclass(item) else ():
                if not method.startswith("_") and (text := getattr(value, "__doc__", None)):
                    found.append((f"{module.__name__}.{name}.{method}", text))
    return found


def test_examples(server: Any, client: subpage.Client, vm: subpage.Vm) -> None:
    known = {name: getattr(subpage, name) for name in subpage.__all__}
    known |= vars(values) | vars(policies) | {"asyncio": asyncio, "url": server.url, "client": client, "vm": vm}
    runner, said = doctest.DocTestRunner(), []
    for module in MODULES:
        for name, text in documented(module):
            test = doctest.DocTestParser().get_doctest(examples_of(text), known, name, module.__file__, 0)
            if name != "subpage":  # its example has names of its own
                test.globs = known
            runner.run(test, out=said.append, clear_globs=False)
    assert not runner.failures and runner.tries > 60, "".join(said)


def test_the_page(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of docs/client.md, one after the other."""
    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    text = (root / "docs" / "client.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    known: dict[str, Any] = {}
    for program in programs:
        exec(program.replace("http://127.0.0.1:8000", server.url), known)
    assert len(programs) == 3 and known["trace"].violations == 1
    known["client"].close()


@pytest.mark.parametrize("kind", [subpage.Client, subpage.Vm, subpage.Trace, subpage.Job, subpage.Footprint])
def test_every_method_has_an_example(kind: type) -> None:
    methods = {name: value for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, Method)}
    assert methods
    assert {name for name, value in methods.items() if ">>>" not in examples_of(value.__doc__ or "")} <= WITHOUT


def test_help_shows_methods() -> None:
    """Of the descriptors, people see the functions."""
    assert inspect.isfunction(subpage.Vm.subpages)
    assert list(inspect.signature(subpage.Vm.subpages).parameters) == ["self", "gfn", "npages", "layer"]
