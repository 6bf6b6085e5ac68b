"""The event log of each machine, and the id that its next event gets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("vms", sa.Column("next_event", sa.BigInteger, nullable=False, server_default="1"))
    op.create_table(
        "events",
        sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), primary_key=True),
        sa.Column("first", sa.BigInteger, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("trace", sa.Text),
    )


def downgrade() -> None:
    op.drop_table("events")
    op.drop_column("vms", "next_event")
