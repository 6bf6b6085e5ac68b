"""Where a store is: ``memory``, ``sqlite:///path`` or ``postgresql://user:password@host/database``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MEMORY = "memory"
SQLITE = "sqlite"
POSTGRESQL = "postgresql"

_FORMS = "must be memory, sqlite:///path or postgresql://user:password@host:port/database"


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
        if scheme in (POSTGRESQL, "postgres") and urlsplit(text).path.strip("/"):
            return cls(POSTGRESQL, f"{POSTGRESQL}://{rest}")
        raise ValueError(_FORMS)

    @property
    def shown(self) -> str:
        """The address without a password."""
        if self.kind != POSTGRESQL:
            return self.text
        parts = urlsplit(self.text)
        if parts.password is None:
            return self.text
        return self.text.replace(f":{parts.password}@", ":***@", 1)


def default_store(environment: dict[str, str], home: Path) -> str:
    """A file in the user's data folder, as the XDG base directory specification places it."""
    folder = Path(environment.get("XDG_DATA_HOME") or home / ".local" / "share")
    return f"{SQLITE}:///{folder / 'subpage' / 'subpage.db'}"
