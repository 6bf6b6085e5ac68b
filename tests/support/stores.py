"""Services on a store, and what the tests look at in it."""

from __future__ import annotations

import contextlib
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from typer.testing import CliRunner, Result

from service.cli.app import app
from service.settings import Settings
from service.storage.database import connect
from service.storage.urls import StoreUrl
from tests.contract.client import ContractClient
from tests.support.server import Running, running


@contextlib.contextmanager
def serving(url: str, *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    """A service in this process; with ``ready``, once it owns the store."""
    with running(Settings(warm_up=False, store=url, **settings)) as service:
        while ready and service.client.get("/readyz").status_code != 200:
            time.sleep(0.005)
        yield service


def run_sql(url: str, *statements: str) -> None:
    """From outside, as an operator might."""
    engine = connect(StoreUrl.parse(url))
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def rows_in(url: str, table: str) -> int:
    engine = connect(StoreUrl.parse(url))
    with engine.connect() as connection:
        count = connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()
    engine.dispose()
    return int(count)


# SQL after which no block can be written, and what takes it back.
BREAK = {
    "sqlite": ["CREATE TRIGGER broken BEFORE INSERT ON blocks BEGIN SELECT RAISE(ABORT, 'no'); END"],
    "postgresql": ["ALTER TABLE blocks ADD CONSTRAINT broken CHECK (block < 0) NOT VALID"],
}
MEND = {"sqlite": ["DROP TRIGGER broken"], "postgresql": ["ALTER TABLE blocks DROP CONSTRAINT broken"]}


def kind(url: str) -> str:
    """Which of BREAK and MEND are for that store."""
    return url.partition(":")[0]


def picture(client: ContractClient, vm: str) -> list[Any]:
    """What clients see of a machine."""
    traces = client.get(f"{vm}/traces").json()["traces"]
    return [
        client.get(vm).json(),
        client.get(f"{vm}/subpages", params={"gfn": 0, "npages": 16}).json(),
        client.get(f"{vm}/memory", params={"gpa": 0x1000, "size": 64}).content,
        client.get(f"{vm}/protections").json(),
        client.get(f"{vm}/counters").json()["counters"]["records"],
        traces,
        [client.get(f"{vm}/traces/{trace['id']}").json() for trace in traces],
        [client.get(f"{vm}/traces/{trace['id']}/exits").json() for trace in traces],
    ]


def command(*arguments: object) -> Result:
    """``subpage`` with those arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def section(kind: bytes, data: bytes) -> bytes:
    """One of a backup, with its checksum."""
    framed = struct.pack("<BI", kind[0], len(data)) + data
    return framed + zlib.crc32(framed).to_bytes(4, "little")
