"""Policies: the one format of docs/policies.md, from files and from lists of objects."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from subpage.errors import BadInput

_MOST_BYTES = 64 << 20


def policy_of(given: Any, name: str | None = None, pages: Sequence[Sequence[Any]] | None = None) -> dict[str, Any]:
    """The document of ``POST …/protections``. ``name`` and ``pages`` stand in where it has none. Raises BadInput. ::

    >>> policy_of([{"name": "table", "gpa": "0x8000", "size": 256}], "kernel")["name"]
    'kernel'
    """
    if isinstance(given, (str, PathLike)):
        document = read_policy(Path(given))
        name = name or document.get("name") or Path(given).stem
    elif isinstance(given, Mapping):
        document = dict(given)
    else:
        document = {"objects": [dict(item) for item in given]}
    document["name"] = name or document.get("name")
    if pages is not None:
        document["pages"] = [list(item) for item in pages]
    if document["name"] is None:
        raise BadInput("name: must be given, or be in the policy")
    return document


def read_policy(path: Path) -> dict[str, Any]:
    """The document in a file, JSON or TOML. Raises BadInput, with the line."""
    try:
        if path.is_dir():
            raise BadInput(f"{path}: is a directory, not a file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise BadInput(f"{path}: a policy has at most {_MOST_BYTES} bytes")
        document = tomllib.loads(data.decode()) if path.suffix == ".toml" else json.loads(data)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is no policy: {error}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path}: is no policy: it must be an object with name and objects")
    return document
