"""What a command says instead of its result, and the files that it could not read."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, BinaryIO


class Failure(Exception):
    """Something that the user can act on: the text says what, and ``status`` is what the command exits with."""

    status = 1


class FileError(Failure):
    """What is wrong with a file, and where in it; the text begins with its name."""


def opened(path: Path) -> BinaryIO:
    """A file to read from. Raises FileError."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        reason = "there is no such file"
    except IsADirectoryError:
        reason = "is a folder, not a file"
    except PermissionError:
        reason = "this user may not read it"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise FileError(f"{path}: {reason}")


def read_document(path: Path, *, toml: bool | None = None) -> dict[str, Any]:
    """The object in a JSON file, or in a TOML file, which ends in .toml unless ``toml`` says. Raises FileError."""
    with opened(path) as file:
        data = file.read()
    try:
        text = data.decode()
        document = tomllib.loads(text) if toml or (toml is None and path.suffix == ".toml") else json.loads(text)
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        said = re.sub(r"\s*\(.*", "", error.msg).lower()
        raise FileError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {said}") from None
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path}: not TOML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: cannot be taken in: {error}") from None
    if not isinstance(document, dict):
        raise FileError(f"{path}: must be an object with members, such as name and objects")
    return document
