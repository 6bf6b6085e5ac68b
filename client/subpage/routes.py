"""Every operation of the contract: routes.json, which `make openapi` makes from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

VERSION = "0.1.0"


class Route(NamedTuple):
    """Where an operation is: its method, and its path with names in braces."""

    method: str
    path: str


ROUTES: Mapping[str, Route] = {
    name: Route(*route)
    for name, route in json.loads(resources.files("subpage").joinpath("routes.json").read_text("utf-8")).items()
}
