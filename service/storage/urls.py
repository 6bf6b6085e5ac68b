"""Where a store is: ``memory``, ``sqlite:///path`` or ``postgresql://user:password@host/database``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MEMORY = "memory"
SQLITE = "sqlite"
POSTGRESQL = "postgresql"

HIDDEN = "(hidden)"

# User and password have no character that could end them, place and parameters none that could be of a password.
_PLAIN = re.compile(
    r"(postgres(?:ql)?://)(?:([A-Za-z0-9._~%+-]+)(?::([^@/?#:\[\]\s]*))?@)?"
    r"((?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])?(?::[0-9]{1,5})?/[A-Za-z0-9._~%+-]+)(?:\?([^@/?#\s]*))?"
)
_TOLD = re.compile(r"(?:sslmode|connect_timeout|application_name|target_session_attrs|channel_binding)=[A-Za-z0-9._-]*")

_FORMS = (
    "must be memory, sqlite:///path or postgresql://user:password@host:port/database; "
    "of a password, what is no letter or digit as %XX"
)


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A checked address. ``kind`` is one of the names above, ``path`` the file of SQLite."""

    kind: str
    text: str
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> StoreUrl:
        """Raises ValueError with the rule."""
        if text == MEMORY:
            return cls(MEMORY, text)
        scheme, _, rest = text.partition("://")
        if scheme == SQLITE and rest.startswith("/") and len(rest) > 1:
            return cls(SQLITE, text, Path(rest[1:]).expanduser())
        if scheme in (POSTGRESQL, "postgres") and _is_read(f"{POSTGRESQL}://{rest}"):
            return cls(POSTGRESQL, f"{POSTGRESQL}://{rest}")
        raise ValueError(_FORMS)

    @property
    def shown(self) -> str:
        """The address without a password."""
        return shown(self.text)


def _is_read(text: str) -> bool:
    """Whether the database library can read an address. What it says where it cannot may quote the password."""
    from sqlalchemy import make_url  # noqa: PLC0415 - in memory the database libraries are not needed
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

    try:
        return bool(urlsplit(text).path.strip("/")) and make_url(text) is not None
    except (ArgumentError, ValueError):
        return False


def shown(text: str) -> str:
    """What may be told of an address: all but its password, and where that is not sure, nothing.

    Passwords have been seen with a raw @, a slash, a question mark, and as parameters; readers of URLs do not agree
    about such ones. Shown is therefore only what has one meaning, and of the parameters those that are no secrets.
    """
    if text == MEMORY or text.startswith(f"{SQLITE}:"):
        return text
    found = _PLAIN.fullmatch(text)
    if found is None:
        scheme = text.partition("://")[0]
        return f"{scheme}://{HIDDEN}" if scheme in (POSTGRESQL, "postgres") else HIDDEN
    start, user, password, place, parameters = found.groups()
    if user is not None:
        place = f"{user}:{HIDDEN}@{place}" if password is not None else f"{user}@{place}"
    if parameters is not None:
        told = [item if _TOLD.fullmatch(item) else HIDDEN for item in parameters.split("&")]
        place += "?" + "&".join(told)
    return start + place


def default_store(environment: dict[str, str], home: Path) -> str:
    """A file in the user's data folder, as the XDG base directory specification places it."""
    folder = Path(environment.get("XDG_DATA_HOME") or home / ".local" / "share")
    return f"{SQLITE}:///{folder / 'subpage' / 'subpage.db'}"
