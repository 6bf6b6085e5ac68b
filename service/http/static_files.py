"""Files that come with the package and are served as they are: each once in memory, coded once."""

from __future__ import annotations

import asyncio
import mimetypes
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from service.http.compression import Kept
from service.http.negotiation import PARQUET

# What the tables of the system may not know, or may know otherwise.
_MEDIA = {".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml", ".parquet": PARQUET}


class StaticFiles:
    """The files below a folder, found when they are first asked for; ``more`` are others by name."""

    def __init__(self, root: Path, more: dict[str, Path] | None = None) -> None:
        self._root = root
        self._more = more or {}
        self.files = cache(self._found)
        self._kept = cache(self._read)

    def _found(self) -> dict[str, Path]:
        """What may be had, by the rest of its URL: nothing else that a path could be made to name."""
        own = {path.relative_to(self._root).as_posix(): path for path in self._root.rglob("*") if path.is_file()}
        return own | self._more

    def _read(self, name: str) -> Kept:
        path = self.files()[name]
        media = _MEDIA.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
        return Kept(path.read_bytes(), media)

    async def reply(self, request: Request, name: str, headers: dict[str, str] | None = None) -> Response:
        """The file as ``request`` wants it. Raises NotFound."""
        if name not in self.files():
            raise NotFound("must be one of the files that come with the service", field="path", value=name)
        return await (await asyncio.to_thread(self._kept, name)).reply(request, headers)
