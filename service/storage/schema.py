"""The tables. A change of them is a new file in ``migrations/versions`` and a new ``REVISION``.

A machine is a head (JSON) and blocks of 4 KiB, as ``engine.machine`` gives them; a block's number tells which one it
replaces. A trace is a head, the lookup tables that name its objects, and its exit records in parts of columns. The
event log of a machine is rows of consecutive ids; a replay's violations are one row that refers to its trace.
"""

from __future__ import annotations

import sqlalchemy as sa

# What `alembic upgrade head` leaves in alembic_version; a store that has it needs no migration.
REVISION = "0005"

metadata = sa.MetaData()

# One row. `epoch` counts owners: a transaction of an owner that has been followed by another finds a different one.
owner = sa.Table(
    "owner",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
)

# `number` orders machines by creation and names them in the other tables.
vms = sa.Table(
    "vms",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("head", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False, server_default="default"),
    # Kept apart from the log, so that ids are never given twice, however short the log is kept.
    sa.Column("next_event", sa.BigInteger, nullable=False, server_default="1"),
)

# Who is let in: `subpage token` writes it, also while a service owns the rest. Times are RFC 3339.
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("expires", sa.Text),
    sa.Column("revoked", sa.Text),
)

blocks = sa.Table(
    "blocks",
    metadata,
    sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), primary_key=True),
    sa.Column("block", sa.BigInteger, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

traces = sa.Table(
    "traces",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), nullable=False, index=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("exit_records", sa.BigInteger, nullable=False),
    sa.Column("head", sa.Text, nullable=False),
    sa.Column("object_index", sa.LargeBinary, nullable=False),
)

trace_parts = sa.Table(
    "trace_parts",
    metadata,
    sa.Column("trace", sa.Text, sa.ForeignKey("traces.id"), primary_key=True),
    sa.Column("part", sa.BigInteger, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# Ids `first` to `first + count - 1`. `created` is RFC 3339 in UTC with six decimals: text in the order of time.
# `trace` outlives what it refers to: the ids of a batch stay taken when its exit records are no longer kept.
events = sa.Table(
    "events",
    metadata,
    sa.Column("vm", sa.BigInteger, sa.ForeignKey("vms.number"), primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("trace", sa.Text),
)

# A trace reduced to its places. `vm` is the id of the machine whose replay it was collected beside, no reference, and
# empty where there was none; `head` says what is in its file, whose `size` bytes are in parts. `created` as in events.
footprints = sa.Table(
    "footprints",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("vm", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("head", sa.Text, nullable=False),
    sa.Index("ix_footprints_tenant_created", "tenant", "created"),
)

footprint_parts = sa.Table(
    "footprint_parts",
    metadata,
    sa.Column("footprint", sa.Text, sa.ForeignKey("footprints.id"), primary_key=True),
    sa.Column("part", sa.BigInteger, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# Long work that was accepted. `vm` is an id and no reference: a job is remembered longer than its machine may live.
# It is empty where a footprint is built; `trace` is the id of what came of it, a trace or a footprint.
# Times are RFC 3339; `error` is the JSON of a problem.
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False, unique=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("vm", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("started", sa.Text),
    sa.Column("finished", sa.Text),
    sa.Column("records", sa.BigInteger, nullable=False),
    sa.Column("trace", sa.Text),
    sa.Column("error", sa.Text),
)

# What was answered under an Idempotency-Key. Status 0: the request was carried out, its answer not yet given.
# `until` is in milliseconds of Unix time.
answers = sa.Table(
    "answers",
    metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("headers", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("until", sa.BigInteger, nullable=False, index=True),
)
