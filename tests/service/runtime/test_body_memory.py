"""What all columnar bodies take of memory together is bounded, whatever each of them may take."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import TraceError
from engine.trace.readers import Budget
from service.runtime.body_memory import BodyMemory
from service.runtime.shares import ShareExceeded
from service.settings import MIB, Settings
from tests.contract.client import ContractClient
from tests.support.bodies import ARROW, PARQUET
from tests.support.server import Running, running
from tests.support.waiting import until

RECORDS = 100_000
TABLE = pa.table({"gpa": np.full(RECORDS, 0x1000, dtype=np.uint64)})


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, use_dictionary=False, compression="none")
    return sink.getvalue()


@pytest.fixture
def own() -> Iterator[Running]:
    with running(Settings(warm_up=False, max_body_memory_bytes=MIB)) as service:
        yield service


def new_vm(client: ContractClient) -> str:
    return client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": MIB}]}).headers["Location"]


def test_a_budget_takes_what_it_ever_needed() -> None:
    memory = BodyMemory(100, 150)
    with memory.budget("red") as first:
        first.keep(40, "it")
        first.check(20, "it")
        first.check(10, "it")
        first.keep(-40, "it")
        first.keep(50, "it")
        assert memory.used == 60
        with pytest.raises(TraceError):
            first.check(51, "it")
        with memory.budget("red") as second:
            second.check(90, "it")
            assert memory.used == 150
            with pytest.raises(ShareExceeded):
                first.check(20, "it")
        assert memory.used == 60
    assert memory.used == 0


def test_budgets_in_many_threads_keep_to_the_bound() -> None:
    memory = BodyMemory(100, 400)
    together = threading.Barrier(8)

    def read(_: int) -> bool:
        with memory.budget("red") as budget:
            together.wait(60)
            try:
                for _ in range(100):
                    budget.keep(1, "it")
                return True
            except ShareExceeded:
                return False
            finally:
                assert memory.used <= 400
                together.wait(60)

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(read, range(8))) <= 4
    assert memory.used == 0


def test_a_tenant_leaves_others_their_part() -> None:
    memory = BodyMemory(100, 100, lambda: 2)
    with memory.budget("red") as red, memory.budget("blue") as blue:
        red.keep(75, "it")
        with pytest.raises(ShareExceeded) as refused:
            red.keep(1, "it")
        assert refused.value.members == {"limit": "max_body_memory_bytes", "limit_of": "tenant"}
        blue.keep(25, "it")


def test_a_budget_that_is_alone() -> None:
    budget = Budget(100)
    budget.keep(100, "it")
    assert Budget.of(budget) is budget and Budget.of(7).limit == 7


@pytest.mark.parametrize(("media", "make"), [(ARROW, arrow), (PARQUET, parquet)], ids=["arrow", "parquet"])
def test_a_body_that_waits_keeps_what_it_has(own: Running, media: str, make: Callable[[], bytes]) -> None:
    """While one waits for its end, another finds no memory, as a call and as a job; afterwards it does."""
    client, memory = own.client, own.app.state.jobs.memory
    waiting, other = new_vm(client), new_vm(client)
    finish = threading.Event()
    body = arrow()

    def trickle() -> Iterator[bytes]:
        yield body[:-8]  # all but the mark of its end
        finish.wait(60)
        yield body[-8:]

    def slow() -> int:
        with ContractClient(base_url=own.url, timeout=120) as second:
            reply = second.post(f"{waiting}/traces", content=trickle(), headers={"Content-Type": ARROW})
            return reply.status_code

    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(slow)
        try:
            until(lambda: memory.used >= 8 * RECORDS)
            headers = {"Content-Type": media}
            reply = client.post(f"{other}/traces", content=make(), headers=headers)
            assert reply.status_code == 429 and reply.headers["Retry-After"]
            assert {"limit": "max_body_memory_bytes", "code": "limit-exceeded"}.items() <= reply.json().items()
            job = client.post(f"{other}/traces", content=make(), headers={**headers, "Prefer": "respond-async"})
            url = job.headers["Location"]
            until(lambda: client.get(url).json()["state"] == "failed")
            assert client.get(url).json()["error"]["limit"] == "max_body_memory_bytes"
            assert client.get(f"{other}/counters").json()["counters"]["records"] == 0
        finally:
            finish.set()
        assert sent.result() == 201
    assert memory.used == 0
    assert client.post(f"{other}/traces", content=make(), headers=headers).json()["records"] == RECORDS
    assert memory.used == 0
