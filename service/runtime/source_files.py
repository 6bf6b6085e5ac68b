"""Files and objects that a client may have read: found within bounds, and opened as they were found."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError, InvalidValue, LimitExceeded
from scale.errors import ScaleError
from scale.sources import PIECE_BYTES, Source, filesystem, first_line
from service.platform.allowed_files import NotAFile, looked_at, reopened, walked
from service.platform.source_places import Asked, NotAllowed, Pattern, Place, name_of, parsed, place_of, places_of

# Names in folders that may be looked at for all patterns of one request, and folders in folders.
_MOST_LOOKED = 100_000
_DEEPEST = 64
_BUFFER = 1 << 18
_WHERE = "the places that the operator lists (SUBPAGE_FOOTPRINT_SOURCES)"
_CHANGED = "must not change while it is read: it is not as it was found"

# What stands in the messages of the libraries below.
_ANSWER = re.compile(r"AWS Error ([A-Z_]+)")

logger = logging.getLogger("subpage.sources")

Check = Callable[[], None]
"""Called now and then; raises when nobody wants it any more."""
Inside = tuple[frozenset[int], int]
"""Where one is in a pattern, and how deep in folders."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the files of one request may be together."""

    max_source_files: int
    max_source_bytes: int


def asked_for(texts: Sequence[str], settings: Sequence[str], tenant: str) -> list[tuple[Asked, Place]]:
    """What a client of a tenant names. Nothing is looked at. Raises InvalidValue."""
    try:
        return parsed(texts, places_of(settings, tenant))
    except NotAllowed as error:
        position = getattr(error, "position", None)
        if position is None:
            raise InvalidValue(str(error), field="sources") from None
        raise InvalidValue(str(error), field=f"sources[{position}]", value=texts[position]) from None


class Files:
    """The files of a tenant, whose ``places`` these are. Everything here may wait: call it in a thread."""

    def __init__(self, places: Sequence[Place], bounds: Bounds, check: Check = lambda: None) -> None:
        self._places = places
        self._folders = [place.name for place in places if not place.root]
        self._bounds = bounds
        self._check = check
        self._looked = 0
        self.longest = bounds.max_source_bytes  # that a file may unpack to

    def found(self, asked: Sequence[tuple[Asked, Place]]) -> list[Source]:
        """The files that are meant, each once, those of a pattern in order of their names; none is opened.

        Raises InvalidValue, LimitExceeded, and what ``check`` does.
        """
        known: dict[str, Source] = {}
        size = 0
        for position, (one, place) in enumerate(asked):
            with _about(f"sources[{position}]", name_of(one.root, one.parts)):
                count = 0
                for source in self._meant(one, place):
                    count += 1
                    size += 0 if source.name in known else source.size
                    known[source.name] = source
                    self._check_bounds(len(known), size)
                if not count:
                    raise InvalidValue("matches no file; * stands for a part of a name, ** for any folders")
        return list(known.values())

    def _check_bounds(self, count: int, size: int) -> None:
        most = self._bounds
        if count > most.max_source_files:
            rule = f"at most {most.max_source_files:,} files may be read for one footprint"
            raise LimitExceeded(rule, field="max_source_files", value=count)
        if size > most.max_source_bytes:
            rule = f"the files of one footprint may have {most.max_source_bytes:,} bytes together"
            raise LimitExceeded(rule, field="max_source_bytes", value=size)

    def _meant(self, asked: Asked, place: Place) -> Iterator[Source]:
        """The file of a name, or those of a pattern."""
        begin, rest = asked.parts[: asked.fixed], asked.parts[asked.fixed :]
        if place.root:
            yield from self._objects(place, begin, Pattern(rest)) if rest else [self._object(place, begin)]
        elif rest:
            yield from self._in_folder(begin, Pattern(rest))
        else:
            yield self._file(name_of("", begin))

    def _file(self, name: str) -> Source:
        self._check()
        if not name.isprintable():
            raise InvalidValue(f"has a file whose name is not printable: {name!a}")
        with looked_at(name, self._folders, _WHERE) as found:
            about = os.fstat(found)
            return Source(name, about.st_size, about.st_mtime_ns)

    def _in_folder(self, begin: Sequence[str], pattern: Pattern) -> Iterator[Source]:
        def below(at: Inside, name: str) -> Inside | None:
            self._look()
            found = pattern.below(at[0], name)
            return (found, at[1] + 1) if found and at[1] < _DEEPEST else None

        def means(at: Inside, name: str) -> bool:
            self._look()
            return pattern.means(at[0], name)

        folder = name_of("", begin)
        names = walked(folder, self._folders, _WHERE, (pattern.begin, 0), below, means)
        for name in sorted(names):
            path = f"{folder.rstrip('/')}/{name}"
            try:
                yield self._file(path)
            except NotAFile as error:
                raise NotAFile(f"{error}: {path}") from None

    def _object(self, place: Place, parts: Sequence[str]) -> Source:
        from pyarrow import fs  # noqa: PLC0415 - the Arrow library is 33 MB

        self._check()
        files, bucket = filesystem(place.address)
        item = files.get_file_info("/".join([bucket, *parts]))
        if item.type != fs.FileType.File:
            raise InvalidValue("must be an object that there is")
        return _source(name_of(place.root, parts), item)

    def _objects(self, place: Place, begin: Sequence[str], pattern: Pattern) -> list[Source]:
        """Listed a folder at a time."""
        from pyarrow import fs  # noqa: PLC0415

        files, bucket = filesystem(place.address)
        found: list[Source] = []
        left: list[tuple[list[str], frozenset[int]]] = [(list(begin), pattern.begin)]
        while left:
            at, where = left.pop()
            self._check()
            for item in files.get_file_info(fs.FileSelector("/".join([bucket, *at]), allow_not_found=True)):
                self._look()
                parts = [*at, str(item.base_name)]
                if item.type == fs.FileType.File and pattern.means(where, parts[-1]):
                    found.append(_source(name_of(place.root, parts), item))
                elif item.type == fs.FileType.Directory and len(parts) <= _DEEPEST:
                    below = pattern.below(where, parts[-1])
                    left += [(parts, below)] if below else []
        return sorted(found)

    def _look(self) -> None:
        """Count a name that is looked at."""
        self._looked += 1
        if self._looked > _MOST_LOOKED:
            raise InvalidValue(f"must be narrower: its folders have more than {_MOST_LOOKED:,} names")
        self._check()

    @contextmanager
    def opened(self, source: Source) -> Iterator[Any]:
        """A file that was found, to be read and sought in. Raises InvalidValue, also where it has changed."""
        root, parts = _taken_apart(source.name)
        size = PIECE_BYTES if root else _BUFFER
        with (
            _about("sources", source.name),
            self._raw(source, root, parts) as raw,
            io.BufferedReader(_Watched(raw, self._check), size) as file,
        ):
            yield file

    @contextmanager
    def _raw(self, source: Source, root: str, parts: Sequence[str]) -> Iterator[Any]:
        place = place_of(self._places, root, parts)
        if root:
            files, bucket = filesystem(place.address)
            with files.open_input_file("/".join([bucket, *parts])) as file:
                if file.size() != source.size:
                    raise InvalidValue(_CHANGED)
                yield file
            return
        with looked_at(source.name, self._folders, _WHERE) as found:
            _check_unchanged(found, source)
            descriptor = reopened(found)
        with io.FileIO(descriptor) as file:
            yield file
            _check_unchanged(descriptor, source)


def _check_unchanged(descriptor: int, source: Source) -> None:
    """Raises InvalidValue for a file that is not as it was found."""
    about = os.fstat(descriptor)
    if (about.st_size, about.st_mtime_ns) != (source.size, source.changed):
        raise InvalidValue(_CHANGED)


def _source(name: str, item: Any) -> Source:
    """An object that was listed. Raises InvalidValue."""
    if not name.isprintable():
        raise InvalidValue(f"has an object whose name is not printable: {name!a}")
    return Source(name, int(item.size or 0), int(item.mtime_ns or 0))


def _taken_apart(name: str) -> tuple[str, list[str]]:
    """The root and the parts of a name that was found."""
    if name.startswith("/"):
        return "", name[1:].split("/")
    scheme, _, rest = name.partition("://")
    bucket, *parts = rest.split("/")
    return f"{scheme}://{bucket}", parts


@contextmanager
def _about(field: str, name: str) -> Iterator[None]:
    """What is wrong with a source, with its name. Raises EngineError."""
    try:
        yield
    except InvalidValue as error:
        if error.field is None and type(error) is InvalidValue:
            error.field, error.value = field, name
        raise
    except (NotAllowed, NotAFile) as error:
        raise InvalidValue(str(error), field=field, value=name) from None
    except ScaleError as error:
        raise InvalidValue(f"cannot be reached: {_why(error)}", field=field, value=name) from None
    except EngineError:
        raise
    except OSError as error:
        raise InvalidValue(f"cannot be read: {_why(error)}", field=field, value=name) from None


def _why(error: Exception) -> str:
    """What clients are told of a store: what it answers, and not where it is. The log has all of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    logger.warning("a source cannot be read: %s", first_line(error))
    found = _ANSWER.search(str(error))
    return f"the store answers {found[1]}" if found else "the store does not answer as it should"


class _Watched(io.RawIOBase):
    """A file whose reader is asked, with every piece, whether it is still wanted."""

    def __init__(self, file: Any, check: Check) -> None:
        self._file, self._check = file, check

    def readinto(self, target: Any) -> int:
        self._check()
        try:
            return int(self._file.readinto(target))
        except OSError as error:
            raise OSError(errno.EIO, _why(error)) from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())
