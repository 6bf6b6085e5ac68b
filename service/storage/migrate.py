"""Brings a store to the schema that this release reads; one that is there already costs one query."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from service.storage.schema import REVISION


class NewerSchema(Exception):
    """The store was written by a later release."""


def stored_revision(connection: sa.Connection) -> str | None:
    """The schema's revision, None for an empty database."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def migrate(connection: sa.Connection) -> None:
    """Run what is missing, in the transaction that the caller has begun. Raises NewerSchema."""
    found = stored_revision(connection)
    if found == REVISION:
        return
    # Loading alembic takes longer than opening a store; most starts find nothing to do.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise NewerSchema(f"the store has schema {found}; this release knows schemas up to {REVISION}")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
