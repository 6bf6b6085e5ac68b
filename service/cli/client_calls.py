"""How each operation of the contract is called: by which methods, or by ``call``."""

from __future__ import annotations

import re

from subpage.client import Client
from subpage.footprints import Footprint
from subpage.jobs import Job
from subpage.machines import Vm
from subpage.modes import Method
from subpage.routes import ROUTES
from subpage.traces import Trace


def methods() -> dict[str, list[str]]:
    """Ways to call each operation, by its id. ::

    >>> methods()["executeAccess"]
    ['Vm.access']
    """
    found: dict[str, list[str]] = {name: [] for name in ROUTES}
    for kind in (Client, Vm, Trace, Job, Footprint):
        for base in kind.__mro__:
            for name, value in vars(base).items():
                for used in value.uses if isinstance(value, Method) else ():
                    found[used].append(f"{kind.__name__}.{name}")
    return {name: ways or [_call(name)] for name, ways in found.items()}


def _call(name: str) -> str:
    places = ", ".join(f'"{place}": …' for place in re.findall(r"{(\w+)}", ROUTES[name].path))
    return f'client.call("{name}", path={{{places}}})' if places else f'client.call("{name}")'


def table() -> str:
    """The table of docs/client.md."""
    rows = (
        f"| `{ROUTES[name].method} {ROUTES[name].path}` | `{name}` | {', '.join(f'`{way}`' for way in ways)} |\n"
        for name, ways in sorted(methods().items(), key=lambda item: (ROUTES[item[0]].path, ROUTES[item[0]].method))
    )
    return "| call | operation | in Python |\n|---|---|---|\n" + "".join(rows)
