"""Where traces are: files of this machine, and objects of stores that ``pyarrow.fs`` reaches, by name or by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engine.footprint.places import MAX_ORIGINS
from scale.errors import ScaleError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://")
_PATTERN = re.compile(r"[*?\[]")
# Objects of up to so many bytes are got whole, by one request; of larger ones pieces of the other size are.
WHOLE_BYTES = 64 << 20
PIECE_BYTES = 8 << 20


class Source(NamedTuple):
    """A file as it was when it was found: ``name`` is a path or an address such as ``s3://bucket/key``, ``changed`` the
    moment of its last change in nanoseconds."""

    name: str
    size: int
    changed: int

    @property
    def label(self) -> str:
        """The last part of its name."""
        return _split(self.name)[0].rpartition("/")[2]


def is_address(text: str) -> bool:
    """Whether it is the address of an object, and no path."""
    return _ADDRESS.match(text) is not None


def expand(texts: Sequence[str]) -> list[Source]:
    """The files of names and patterns, each pattern's in order of their names. Raises ScaleError."""
    found = [source for text in texts for source in _expanded(text)]
    if len(found) > MAX_ORIGINS:
        rule = f"{len(found):,} files: a footprint has at most {MAX_ORIGINS:,} traces. Put several into one"
        raise ScaleError(f"{', '.join(texts)}: {rule}")
    return found


def _expanded(text: str) -> list[Source]:
    body, options = _split(text)
    wild = _PATTERN.search(body)
    if wild is None or (not is_address(text) and Path(text).exists()):
        return [_one(text)]
    base = body[: wild.start()].rpartition("/")[0]
    before = base + "/" if "/" in body[: wild.start()] else ""
    pattern = body.removeprefix(before)
    from pyarrow import fs  # noqa: PLC0415 - the Arrow library is 33 MB

    files, folder = filesystem((base or before or ".") + options)
    with _said(text):
        listed = files.get_file_info(
            fs.FileSelector(folder, allow_not_found=True, recursive="/" in pattern or "**" in pattern)
        )
    wanted, inside = re.compile(_regular(pattern)), folder.rstrip("/") + "/"
    there = ((item.path.removeprefix(inside), item) for item in listed if item.type == fs.FileType.File)
    found = sorted(_source(before + name + options, item) for name, item in there if wanted.fullmatch(name))
    if not found:
        raise ScaleError(f"{text}: matches no file; * stands for a part of a name, ** for any folders")
    return found


def _split(text: str) -> tuple[str, str]:
    """An address without its options (``?endpoint_override=…``), and these with their mark. A path has none."""
    body, mark, options = text.partition("?")
    return (body, mark + options) if is_address(text) and "=" in options else (text, "")


def inside(folder: str, name: str) -> str:
    """The path or address of what is in a folder."""
    body, options = _split(folder)
    return f"{body.rstrip('/')}/{name}{options}"


def _regular(pattern: str) -> str:
    """A pattern of the shell as a regular expression, whose wildcards stay within a folder but for ``**``."""
    found, at = "", 0
    while at < len(pattern):
        rest = pattern[at:]
        if rest.startswith("**/"):
            found, at = found + "(?:.*/)?", at + 3
        elif rest.startswith("**"):
            found, at = found + ".*", at + 2
        elif rest[0] == "*":
            found, at = found + "[^/]*", at + 1
        elif rest[0] == "?":
            found, at = found + "[^/]", at + 1
        elif (some := re.match(r"\[(!?)(\]?[^\]/]*)\]", rest)) is not None:
            these = re.sub(r"([\\\[\]^&~|])", r"\\\1", some[2])
            found, at = f"{found}[{'^/' if some[1] else ''}{these}]", at + len(some[0])
        else:
            found, at = found + re.escape(rest[0]), at + 1
    return found


def _one(text: str) -> Source:
    """Raises ScaleError."""
    if not is_address(text):
        try:
            status = Path(text).stat()
        except (OSError, ValueError):
            return Source(text, 0, 0)  # whoever opens it says what is wrong
        return Source(text, status.st_size, status.st_mtime_ns)
    files, path = filesystem(text)
    from pyarrow import fs  # noqa: PLC0415

    with _said(text):
        item = files.get_file_info(path)
    if item.type != fs.FileType.File:
        raise ScaleError(f"{text}: {'is a folder, not a file' if item.type == fs.FileType.Directory else _NONE}")
    return _source(text, item)


def check_unchanged(source: Source) -> None:
    """Raise ScaleError for one that is not as it was found."""
    if _one(source.name) != source:
        raise ScaleError(f"{source.name}: has changed since it was found: run this again when nobody writes to it")


_NONE = "there is no such file"


def _source(name: str, item: Any) -> Source:
    return Source(name, int(item.size or 0), int(item.mtime_ns or 0))


def filesystem(text: str) -> tuple[Any, str]:
    """Where a path or an address is, as ``pyarrow.fs`` has it, and its path there. Raises ScaleError."""
    from pyarrow import ArrowException, fs  # noqa: PLC0415

    if not is_address(text):
        return fs.LocalFileSystem(), str(Path(text).absolute())
    try:
        files, path = fs.FileSystem.from_uri(text)
    except (ArrowException, ValueError, OSError, ImportError) as error:
        raise ScaleError(f"{text}: cannot be reached: {first_line(error)}") from None
    return files, path


@contextmanager
def opened(source: Source) -> Iterator[Any]:
    """An object, to be read and sought in. Raises ScaleError, also for one that is not what was found."""
    from pyarrow import BufferReader  # noqa: PLC0415

    files, path = filesystem(source.name)
    with _said(source.name):
        file = files.open_input_file(path)
        size = file.size()
        if size <= WHOLE_BYTES:
            with file:
                file = BufferReader(file.read_buffer(size))
    if size != source.size:
        file.close()
        raise ScaleError(f"{source.name}: has {size:,} bytes now, and had {source.size:,} when it was found")
    with file:
        yield file


@contextmanager
def _said(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ScaleError(f"{name}: {_NONE}") from None
    except PermissionError as error:
        raise ScaleError(f"{name}: it may not be read: {first_line(error)}") from None
    except OSError as error:
        raise ScaleError(f"{name}: cannot be read: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """What an error says, without what the libraries below add."""
    return str(error).strip().partition("\n")[0]
