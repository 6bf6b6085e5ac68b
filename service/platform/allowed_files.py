"""Files below directories that the operator allows, whatever symbolic links say.

What is opened is what is looked at: a name is resolved once, and the file that it led to is the one that is checked, by
where it is, and read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

# Nothing happens to what a name leads to, a device perhaps, before it is known to be a file.
_LOOK = os.O_PATH | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOUND = "/proc/self/fd/{}"


class NotAFile(Exception):
    """A name that leads to no file that may be read; the text is the rule."""


def within(path: str, directories: Sequence[str]) -> bool:
    """Whether a path is one of these directories or below it, as it is written."""
    return any(Path(path).is_relative_to(directory) for directory in directories)


@contextmanager
def looked_at(path: str, directories: Sequence[str], where: str, kind: str = "a file") -> Iterator[int]:
    """A file below ``directories``, without opening it for anything. Raises NotAFile, with ``where`` and ``kind`` as
    the rule calls the directories and what must be there."""
    try:
        found = os.open(path, _LOOK)
    except (OSError, ValueError) as error:
        raise NotAFile(f"must exist: {getattr(error, 'strerror', error)}") from None
    try:
        place = str(Path(_FOUND.format(found)).readlink())
        if not within(place, [os.path.realpath(directory) for directory in directories]):
            raise NotAFile(f"must not lead out of {where}")
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise NotAFile(f"must be {kind}")
        yield found
    finally:
        os.close(found)


def reopened(found: int) -> int:
    """What was looked at, open for reading, whatever the name leads to by now. Raises NotAFile."""
    try:
        return os.open(_FOUND.format(found), _READ)
    except OSError as error:
        raise NotAFile(f"must be readable: {error.strerror}") from None


Entered = TypeVar("Entered")


def walked(
    begin: str,
    directories: Sequence[str],
    where: str,
    at: Entered,
    below: Callable[[Entered, str], Entered | None],
    means: Callable[[Entered, str], bool],
) -> Iterator[str]:
    """Files below the folder ``begin``, by their paths from there, in no order; symbolic links lead to files alone.

    ``at`` is what ``below`` makes, of what it was and the name of a folder, for what is in that folder; None leaves it
    out. ``means`` says of a name whether a file of it is wanted. Raises NotAFile, what these do, and OSError.
    """
    try:
        first = os.open(begin, _FOLDER)
    except (OSError, ValueError) as error:
        raise NotAFile(f"must be in a folder that there is: {getattr(error, 'strerror', error)}") from None
    try:
        place = str(Path(_FOUND.format(first)).readlink())
        if not within(place, [os.path.realpath(directory) for directory in directories]):
            raise NotAFile(f"must not lead out of {where}")
        yield from _walked(first, at, below, means)
    finally:
        os.close(first)


def _walked(
    folder: int,
    at: Entered,
    below: Callable[[Entered, str], Entered | None],
    means: Callable[[Entered, str], bool],
) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                if means(at, entry.name) and _leads_to_file(entry.name, folder):
                    yield entry.name
                continue
            inside = below(at, entry.name)
            if inside is None:
                continue
            inner = os.open(entry.name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            try:
                for path in _walked(inner, inside, below, means):
                    yield f"{entry.name}/{path}"
            finally:
                os.close(inner)


def _leads_to_file(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder).st_mode)
    except OSError:
        return False
