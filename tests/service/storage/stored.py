"""Services on a store, and what the tests look at in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from service.settings import Settings
from service.storage.database import connect
from service.storage.urls import StoreUrl
from tests.contract.client import ContractClient
from tests.service.running import Running, running

MIB = 1 << 20


@contextlib.contextmanager
def serving(url: str, *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    """A service in this process; with ``ready``, once it owns the store."""
    with running(Settings(warm_up=False, store=url, **settings)) as service:
        while ready and service.client.get("/readyz").status_code != 200:
            time.sleep(0.005)
        yield service


def new_vm(client: ContractClient, **members: Any) -> str:
    document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}], "spp": True, **members}
    reply = client.post("/v1/vms", json=document)
    assert reply.status_code == 201, reply.text
    return reply.headers["Location"]


def set_map(client: ContractClient, vm: str, gfn: int, word: int) -> int:
    return client.put(f"{vm}/subpages", params={"gfn": gfn, "npages": 1}, json={"access": [word]}).status_code


def map_of(client: ContractClient, vm: str, gfn: int) -> int:
    return int(client.get(f"{vm}/subpages", params={"gfn": gfn, "npages": 1}).json()["access"][0], 16)


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
