"""Machines, their blocks, and results of replays."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "owner",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
    )
    op.create_table(
        "vms",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("head", sa.Text, nullable=False),
    )
    op.create_table(
        "blocks",
        sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), primary_key=True),
        sa.Column("block", sa.BigInteger, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "traces",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), nullable=False, index=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Text, nullable=False),
        sa.Column("exit_records", sa.BigInteger, nullable=False),
        sa.Column("head", sa.Text, nullable=False),
        sa.Column("object_index", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "trace_parts",
        sa.Column("trace", sa.Text, sa.ForeignKey("traces.id"), primary_key=True),
        sa.Column("part", sa.BigInteger, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.bulk_insert(
        sa.table("owner", sa.column("id", sa.Integer), sa.column("epoch", sa.BigInteger), sa.column("holder", sa.Text)),
        [{"id": 1, "epoch": 0, "holder": ""}],
    )


def downgrade() -> None:
    for name in ("trace_parts", "traces", "blocks", "vms", "owner"):
        op.drop_table(name)
