"""Which members a document has at a place that a validation error names."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

# An error names so many members.
_NAMED = 24


def members_at(model: Any, steps: Sequence[str | int]) -> tuple[str, ...]:
    """Names of the members that ``model``, a type, has where ``steps`` lead: ``("objects", 0)``.

    Steps are as pydantic gives them: names, positions, and tags of the branch of a union. Nothing where no document of
    the contract is there, or where several could be.
    """
    found = _documents(model)
    for step in steps:
        if isinstance(step, int):
            continue  # what a list holds is what its type was made of
        inner = {_name(document, step): document for document in found}.get(step)
        if inner is not None:
            field = next(f for name, f in inner.model_fields.items() if step in (name, f.alias))
            found = _documents(field.annotation)
        elif len(found) > 1:
            found = [document for document in found if step in (document.__name__, _tag(document))]
    if len(found) != 1:
        return ()
    return tuple(field.alias or name for name, field in found[0].model_fields.items())


def shortened(names: Sequence[str]) -> str:
    """The names with commas between them, the first few of very many."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _documents(kind: Any) -> list[type[BaseModel]]:
    """The documents that a type is made of: itself, the branches of a union, what a list or a mapping holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [document for part in get_args(kind) if part is not NoneType for document in _documents(part)]


def _name(document: type[BaseModel], step: str) -> str | None:
    """``step`` if the document has such a member."""
    return step if any(step in (name, field.alias) for name, field in document.model_fields.items()) else None


def _tag(document: type[BaseModel]) -> str | None:
    """What chooses the document among those of a union: the one word that its member ``type`` may be."""
    field = document.model_fields.get("type")
    words = get_args(field.annotation) if field is not None else ()
    return str(words[0]) if len(words) == 1 else None
