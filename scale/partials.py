"""What came of single files, kept while more is made, so that a run that was broken off goes on.

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
from typing import Any, ClassVar

from engine.errors import EngineError
from engine.footprint import stored
from engine.footprint.places import By, Footprint
from scale.errors import ScaleError
from scale.sources import Source, filesystem, first_line, inside, is_address

_HASH = re.compile(r"[0-9a-f]{32}")
_MEMORY = 64 << 30  # that reading one may take: it is the user's own file


def hash_of(*what: Any) -> str:
    """A name for what the name of a partial says: anything that JSON has."""
    return hashlib.sha256(json.dumps(what).encode(errors="surrogatepass")).hexdigest()[:32]


def name_of(source: Source, how: str, part: str = "") -> str:
    """The name of the partial of a file, or of a part of it. ``how``: everything that what comes of it depends on."""
    return hash_of(list(source), how, part, stored.SCHEMA) + Partials.suffix


@dataclass(frozen=True)
class Kept:
    """Files of one kind, told by its ``suffix``, in a ``folder``: a path or an address."""

    folder: str
    suffix: ClassVar[str]

    def make(self) -> None:
        """Make the folder. Raises ScaleError."""
        files, path = filesystem(self.folder)
        try:
            files.create_dir(path, recursive=is_address(self.folder))
        except OSError as error:
            why = first_line(error)
            raise ScaleError(f"{self.folder}: no folder for partial results can be made there: {why}") from None

    def content(self, name: str) -> bytes | None:
        """Of one that is there."""
        files, path = filesystem(inside(self.folder, name))
        try:
            with files.open_input_file(path) as file:
                return bytes(file.read())
        except OSError:
            return None

    def refusal(self, name: str, rule: str) -> ScaleError:
        """Of one that is not what its name says."""
        return ScaleError(f"{inside(self.folder, name)}: {rule}. Delete it, and it is made again")

    def has(self, name: str) -> bool:
        """Whether one is there, whatever is in it."""
        from pyarrow import fs  # noqa: PLC0415 - the Arrow library is 33 MB

        files, path = filesystem(inside(self.folder, name))
        try:
            return bool(files.get_file_info(path).type == fs.FileType.File)
        except OSError:
            return False

    def put(self, name: str, content: Any) -> bool:
        """Keep one, whole or not at all; whether the folder is seen from here, and takes it."""
        from pyarrow import fs  # noqa: PLC0415

        files, folder = filesystem(self.folder)
        path = f"{folder.rstrip('/')}/{name}"
        try:
            if files.get_file_info(folder).type != fs.FileType.Directory:
                return False
            if not isinstance(files, fs.LocalFileSystem):  # an object is there when all of it is
                _put(files, path, content)
                return True
            beside = f"{path}.{secrets.token_hex(8)}"
            _put(files, beside, content)
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
        return [item.base_name for item in listed if self._is_one(item.base_name)]

    def _is_one(self, name: str) -> bool:
        return name.endswith(self.suffix) and _HASH.fullmatch(name.removesuffix(self.suffix)) is not None

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


@dataclass(frozen=True)
class Partials(Kept):
    """Footprints of one ``level`` and ``by``."""

    level: str
    by: By
    suffix = ".footprint"

    def read(self, name: str) -> Footprint | None:
        """One that is there. Raises ScaleError for what is not what its name says."""
        data = self.content(name)
        if data is None:
            return None
        try:
            found = stored.read(io.BytesIO(data), _MEMORY)
        except EngineError as error:
            raise self.refusal(name, f"is damaged: {error.rule}") from None
        if (found.level, found.by) != (self.level, self.by):
            rule = f"is of {found.level} by {dict(found.by._asdict())}, and {self.level} by {dict(self.by._asdict())}"
            raise self.refusal(name, f"{rule} are wanted")
        return found

    def write(self, name: str, footprint: Footprint) -> bool:
        """Keep one; whether that was possible."""
        sink = io.BytesIO()
        stored.write(footprint, sink)
        return self.put(name, sink.getbuffer())


@dataclass(frozen=True)
class Documents(Kept):
    """Documents, each with what it is ``of``."""

    suffix = ".json"

    def read(self, name: str, of: Any) -> dict[str, Any] | None:
        """One that is there. Raises ScaleError for what is not what its name says."""
        data = self.content(name)
        if data is None:
            return None
        try:
            found = json.loads(data)
            document = found["document"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self.refusal(name, "is damaged") from None
        if found.get("of") != of or not isinstance(document, dict):
            raise self.refusal(name, "is of something else")
        return document

    def write(self, name: str, of: Any, document: dict[str, Any]) -> bool:
        """Keep one; whether that was possible."""
        return self.put(name, json.dumps({"of": of, "document": document}).encode(errors="surrogatepass"))


def _put(files: Any, path: str, content: Any) -> None:
    with files.open_output_stream(path) as file:
        file.write(content)
