"""What machines, results and jobs have in common: a document that was read, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from subpage.core import Core
from subpage.html import Document, of_members
from subpage.wire import Reply


class Handle:
    """``document`` is what was last read of it; items are its members."""

    # Names of its path, and the members of its document that they are.
    _names: ClassVar[Mapping[str, str]]

    def __init__(self, core: Core, found: Mapping[str, Any]) -> None:
        self._core, self.document = core, Document(found)
        self._place = {name: str(self.document[member]) for name, member in self._names.items()}

    @property
    def id(self) -> str:
        """Its id: ``vm_…``, ``tr_…``, ``job_…``."""
        return str(self.document["id"])

    def __getitem__(self, member: str) -> Any:
        return self.document[member]

    async def _call(self, operation_id: str, *, path: Mapping[str, Any] | None = None, **options: Any) -> Reply:
        return await self._core.call(operation_id, path={**self._place, **(path or {})}, **options)

    async def _document(self, operation_id: str, *, path: Mapping[str, Any] | None = None, **options: Any) -> Document:
        return await self._core.document(operation_id, path={**self._place, **(path or {})}, **options)

    def _repr_html_(self) -> str:
        return of_members(self.document, self.id)
