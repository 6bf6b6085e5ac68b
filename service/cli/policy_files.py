"""Policies in files of the command line: what they say, or where they are wrong and by which rule.

A policy is what ``POST …/protections`` takes (``service.api.protection.policies``), as JSON or TOML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from engine.errors import EngineError
from engine.kvm.protections import validate
from engine.symbols.formats import told
from service.api.protection.policies import ProtectionRequest
from service.http.handlers import refusal
from service.platform.failures import FileError, opened, read_document
from service.problems import ServiceError, said

# Bits of the widest guest-physical addresses; those of a machine are checked when it is there.
_WIDEST = 52
# Bytes of a file by which it is found out that it is something else.
_LOOKED_AT = 1 << 13


def read_policy(path: Path, *, named: bool = False) -> ProtectionRequest:
    """The policy in a file; one without a name has that of the file. ``named``: the machine that it is for has symbols,
    and will say which of its objects cannot be. Raises FileError."""
    return policy_of(path, policy_document(path), named=named)


def policy_document(path: Path) -> dict[str, Any]:
    """The document in a file of a policy. Raises FileError, which says what to do with a file of symbols."""
    with opened(path) as file:
        begin = file.read(_LOOKED_AT)
    if (symbols := told(begin)) is not None:
        rule = f"is no policy, but {symbols}. A policy is made of it by"
        raise FileError(f"{path}: {rule} `subpage policy from-symbols {path} --object NAME -o policy.json`")
    return read_document(path)


def policy_of(path: Path, document: Mapping[str, Any], *, named: bool = False) -> ProtectionRequest:
    """The policy that ``document``, read from ``path``, is; ``named`` as above. Raises FileError."""
    try:
        policy = ProtectionRequest.model_validate({"name": name_of_file(path), **document})
        if not named:
            checked(policy)
    except ValidationError as error:
        raise FileError(f"{path}: {said(refusal(error.errors()))}") from None
    except (EngineError, ServiceError) as error:
        raise FileError(f"{path}: {said(error)}") from None
    return policy


def checked(policy: ProtectionRequest, where: str = "") -> None:
    """Refuse what the service would whatever the machine is; ``where`` goes before the names of members.

    Raises EngineError or ServiceError.
    """
    try:
        validate(policy.protection(), _WIDEST)
    except (EngineError, ServiceError) as error:
        error.field = f"{where}{error.field}"
        raise


def name_of_file(path: Path) -> str:
    """What a policy without a name is called."""
    return re.sub(r"[^A-Za-z0-9_.~-]", "_", path.stem)[:128].lstrip(".~-") or "policy"


class Named(Protocol):
    """A policy."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Named)


def named_policies(
    paths: Sequence[Path], read: Callable[[Path], P], move: Callable[[float], object] = lambda share: None
) -> dict[str, P]:
    """Policies by name, those of folders in order of their files; of two with one name the file's is taken.

    Raises Failure.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(item for item in path.iterdir() if item.suffix in (".json", ".toml"))
        if not inside:
            raise FileError(f"{path}: has no policy in it, no file that ends in .json or .toml")
        files += inside
    found: dict[str, P] = {}
    for number, file in enumerate(files):
        policy = read(file)
        name = policy.name if policy.name not in found else file.stem
        if name in found:
            name = str(file)
        found[name] = policy
        move((number + 1) / len(files))
    return found
