"""What machines, results and jobs have in common: a document that was read, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from subpage.core import Core
from subpage.html import Document, of_members
from subpage.wire import Reply

T = TypeVar("T")


class Member(Generic[T]):
    """A member of the document, as what ``kind`` makes of it."""

    def __init__(self, kind: Callable[[Any], T], about: str) -> None:
        self._kind, self.__doc__ = kind, about

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Handle, owner: type) -> T:
        return self._kind(instance.document[self._name])


class Handle:
    """``document`` is what was last read of it; items are its members."""

    # Names of its path, and the members of its document that they are.
    _names: ClassVar[Mapping[str, str]]
    id = Member(str, "Its id: ``vm_…``, ``tr_…``, ``job_…``.")

    def __init__(self, core: Core, found: Mapping[str, Any]) -> None:
        self._core, self.document = core, Document(found)
        self._place = {name: str(self.document[member]) for name, member in self._names.items()}

    def __getitem__(self, member: str) -> Any:
        return self.document[member]

    async def _call(self, operation_id: str, *, path: Any = None, **options: Any) -> Reply:
        return await self._core.call(operation_id, path={**self._place, **(path or {})}, **options)

    async def _document(self, operation_id: str, *, path: Any = None, **options: Any) -> Document:
        return await self._core.document(operation_id, path={**self._place, **(path or {})}, **options)

    def _repr_html_(self) -> str:
        return of_members(self.document, self.id)
