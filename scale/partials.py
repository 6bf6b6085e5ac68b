"""Footprints of single files that are kept while more are made, so that a run that was broken off goes on.

A partial has the name of what it is of: the file by its name, size and last change, and how it was read. A file
that has changed is therefore read again. The folder is any that ``pyarrow.fs`` reaches; nodes that do not see it keep
nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.footprint import stored
from engine.footprint.places import By, Footprint
from scale.errors import ScaleError
from scale.sources import Source, filesystem, first_line, inside, is_address

_NAME = re.compile(r"[0-9a-f]{32}\.footprint")
_MEMORY = 64 << 30  # that reading one may take: it is the user's own file


def name_of(source: Source, how: str, part: str = "") -> str:
    """The name of the partial of a file, or of a part of it. ``how``: everything that what comes of it depends on."""
    document = json.dumps([list(source), how, part, stored.SCHEMA])
    return hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()[:32] + ".footprint"


@dataclass(frozen=True)
class Partials:
    """Partials of one ``level`` and ``by`` in a ``folder``: a path or an address."""

    folder: str
    level: str
    by: By

    def make(self) -> None:
        """Make the folder. Raises ScaleError."""
        files, path = filesystem(self.folder)
        try:
            files.create_dir(path, recursive=is_address(self.folder))
        except OSError as error:
            why = first_line(error)
            raise ScaleError(f"{self.folder}: no folder for partial results can be made there: {why}") from None

    def read(self, name: str) -> Footprint | None:
        """One that is there. Raises ScaleError for what is not what its name says."""
        files, path = filesystem(inside(self.folder, name))
        try:
            with files.open_input_file(path) as file:
                data = file.read()
        except OSError:
            return None
        called = inside(self.folder, name)
        try:
            found = stored.read(io.BytesIO(data), _MEMORY)
        except EngineError as error:
            raise ScaleError(f"{called}: is damaged: {error.rule}. Delete it, and it is made again") from None
        if (found.level, found.by) != (self.level, self.by):
            rule = f"is of {found.level} by {dict(found.by._asdict())}, and {self.level} by {dict(self.by._asdict())}"
            raise ScaleError(f"{called}: {rule} are wanted. Delete it, and it is made again")
        return found

    def has(self, name: str) -> bool:
        """Whether one is there, whatever is in it."""
        from pyarrow import fs  # noqa: PLC0415 - the Arrow library is 33 MB

        files, path = filesystem(inside(self.folder, name))
        try:
            return bool(files.get_file_info(path).type == fs.FileType.File)
        except OSError:
            return False

    def write(self, name: str, footprint: Footprint) -> bool:
        """Keep one, whole or not at all; whether the folder is seen from here, and takes it."""
        from pyarrow import fs  # noqa: PLC0415

        files, folder = filesystem(self.folder)
        path = f"{folder.rstrip('/')}/{name}"
        sink = io.BytesIO()
        stored.write(footprint, sink)
        try:
            if files.get_file_info(folder).type != fs.FileType.Directory:
                return False
            if not isinstance(files, fs.LocalFileSystem):  # an object is there when all of it is
                _put(files, path, sink)
                return True
            beside = f"{path}.{secrets.token_hex(8)}"
            _put(files, beside, sink)
            files.move(beside, path)
        except OSError:
            return False
        return True

    def names(self) -> list[str]:
        """Of all that are there, of whatever they are."""
        from pyarrow import fs  # noqa: PLC0415

        files, folder = filesystem(self.folder)
        try:
            listed = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        except OSError:
            return []
        return [item.base_name for item in listed if _NAME.fullmatch(item.base_name)]

    def clear(self) -> None:
        """Remove all of them, and the folder if nothing else is in it."""
        files, folder = filesystem(self.folder)
        for name in self.names():
            files.delete_file(f"{folder.rstrip('/')}/{name}")
        self.leave()

    def leave(self) -> None:
        """Remove the folder if nothing is in it."""
        from pyarrow import fs  # noqa: PLC0415

        files, folder = filesystem(self.folder)
        try:
            if not files.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
                files.delete_dir(folder)
        except OSError:
            return


def _put(files: Any, path: str, content: io.BytesIO) -> None:
    with files.open_output_stream(path) as file:
        file.write(content.getbuffer())
