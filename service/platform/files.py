"""Files of the service are their owner's alone, whatever the umask: they hold guest memory, and hashes of tokens."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are not there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(FOLDER_MODE)


def make_private(path: Path) -> None:
    """Make an empty file, and its folder, unless it is there; no link is followed.

    What SQLite makes beside a database gets the mode of the database.
    """
    if not path.exists():
        make_folder(path.parent)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
        except FileExistsError:
            if not path.exists():
                raise  # a link to nothing
