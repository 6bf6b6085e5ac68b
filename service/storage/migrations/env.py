"""Runs migrations on the connection that the service hands over (see ``service.storage.migrate``)."""

from __future__ import annotations

from alembic import context

from service.storage.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
