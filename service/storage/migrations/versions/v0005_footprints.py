"""Footprints: traces reduced to their places."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "footprints",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("vm", sa.Text, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("head", sa.Text, nullable=False),
    )
    op.create_index("ix_footprints_tenant_created", "footprints", ["tenant", "created"])
    op.create_table(
        "footprint_parts",
        sa.Column("footprint", sa.Text, sa.ForeignKey("footprints.id"), primary_key=True),
        sa.Column("part", sa.BigInteger, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    for name in ("footprint_parts", "footprints"):
        op.drop_table(name)
