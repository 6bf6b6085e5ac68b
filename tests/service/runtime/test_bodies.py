"""Request bodies as files: the pipe, and what happens when a request ends before its body does."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from service.runtime.bodies import BodyAborted, BodyPipe, Upload, unless_first
from tests.contract.client import ContractClient
from tests.support.bodies import gpa8
from tests.support.server import Running


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def feed(chunks: list[bytes], bound: int, read: Callable[[BodyPipe], Any]) -> Any:
    """What ``read`` makes of a pipe into which ``chunks`` flow."""

    async def run() -> Any:
        loop = asyncio.get_running_loop()
        pipe = BodyPipe(loop, bound)
        reader = loop.run_in_executor(None, read, pipe)
        for chunk in chunks:
            await pipe.feed(chunk)
        pipe.end()
        return await reader

    return asyncio.run(run())


CHUNKS = [bytes([n]) * n for n in range(1, 100)]
WHOLE = b"".join(CHUNKS)


@pytest.mark.parametrize("bound", [1, 50, 1 << 20])
@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_read_gives_whole_pieces(bound: int, size: int) -> None:
    def read(pipe: BodyPipe) -> list[bytes]:
        pieces = []
        while piece := pipe.read(size):
            pieces.append(piece)
        assert pipe.read(1) == b""
        return pieces

    pieces = feed(CHUNKS, bound, read)
    assert b"".join(pieces) == WHOLE and all(len(piece) == size for piece in pieces[:-1])


def test_read_everything_and_nothing() -> None:
    assert feed(CHUNKS, 10, lambda pipe: pipe.read()) == WHOLE
    assert feed([], 10, lambda pipe: pipe.read()) == b""
    assert feed([b"abc"], 10, lambda pipe: pipe.read(0)) == b""


@pytest.mark.parametrize("size", [1, 13, 5000])
def test_readinto_fills_what_there_is(size: int) -> None:
    def read(pipe: BodyPipe) -> bytes:
        gathered = bytearray()
        target = bytearray(size)
        while stored := pipe.readinto(memoryview(target)):
            gathered += target[:stored]
        return bytes(gathered)

    assert feed(CHUNKS, 100, read) == WHOLE


def test_looks_like_a_file() -> None:
    async def run() -> None:
        pipe = BodyPipe(asyncio.get_running_loop(), 1)
        assert pipe.readable() and not pipe.seekable() and not pipe.closed

    asyncio.run(run())


def test_an_aborted_body_raises_in_the_reader() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        pipe = BodyPipe(loop, 4)
        waiting = loop.run_in_executor(None, pipe.read, 100)
        await pipe.feed(b"1234")
        pipe.check()
        pipe.abort()
        with pytest.raises(BodyAborted):
            await waiting
        with pytest.raises(BodyAborted):
            pipe.check()
        # Nobody reads any more, and the writing end does not hang.
        await asyncio.wait_for(pipe.feed(b"12345678"), 5)
        await asyncio.wait_for(pipe.feed(b"12345678"), 5)

    asyncio.run(run())


def request_of(messages: list[dict[str, Any]]) -> Request:
    queue = list(messages)

    async def receive() -> Any:
        if not queue:
            await asyncio.Event().wait()
        return queue.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


PART = {"type": "http.request", "body": b"part", "more_body": True}
LAST = {"type": "http.request", "body": b"last", "more_body": False}
GONE = {"type": "http.disconnect"}


def test_upload(executor: ThreadPoolExecutor) -> None:
    async def run() -> bytes:
        async with Upload(request_of([PART, LAST]), executor, 10) as upload:
            return await upload.run(lambda pipe: pipe.read())

    assert asyncio.run(run()) == b"partlast"


@pytest.mark.parametrize("how", ["comes", "fails", "failed before", "both", "cancelled", "cancelled and fails"])
def test_what_is_waited_for_in_the_same_task(how: str) -> None:
    """It is given up when the other fails, and only then; the task can be waited in and cancelled afterwards."""

    async def run() -> str:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        trouble: asyncio.Future[None] = loop.create_future()

        async def fails() -> None:
            await trouble

        async def waits() -> str:
            return await answer

        async def asks() -> str:
            try:
                return await unless_first(waits(), failing)
            except ClientDisconnect:
                await asyncio.sleep(0)  # not cancelled
                return "left"

        failing = loop.create_task(fails())
        if how == "failed before":
            trouble.set_exception(ClientDisconnect())
            await asyncio.wait([failing])
        asking = loop.create_task(asks())
        await asyncio.sleep(0)
        if how in ("comes", "both"):
            answer.set_result("answer")
        if "cancelled" in how:
            asking.cancel()
        if how in ("fails", "both", "cancelled and fails"):
            trouble.set_exception(ClientDisconnect())
        try:
            return await asking
        except asyncio.CancelledError:
            return "cancelled"
        finally:
            failing.cancel()
            await asyncio.wait([failing])
            assert how in ("comes", "cancelled") or failing.exception() is not None

    found = asyncio.run(run())
    assert found in {"comes": ("answer",), "both": ("answer", "left")}.get(
        how, ("cancelled",) if "cancelled" in how else ("left",)
    )


def test_work_may_end_before_the_body(executor: ThreadPoolExecutor) -> None:
    async def run() -> bytes:
        async with Upload(request_of([PART]), executor, 10) as upload:
            return await upload.run(lambda pipe: pipe.read(2))

    assert asyncio.run(run()) == b"pa"


@pytest.mark.parametrize("messages", [[PART, GONE], [PART, LAST, GONE]])
def test_the_reason_is_that_the_client_left(executor: ThreadPoolExecutor, messages: list[dict[str, Any]]) -> None:
    ended: list[str] = []

    def work(pipe: BodyPipe) -> None:
        try:
            while True:
                pipe.read(1)
                pipe.check()
        finally:
            ended.append("yes")

    async def run() -> None:
        async with Upload(request_of(messages), executor, 10) as upload:
            await upload.run(work)

    with pytest.raises(ClientDisconnect):
        asyncio.run(run())
    assert ended


def test_a_result_that_came_counts(executor: ThreadPoolExecutor) -> None:
    """The client leaves while the work is past its last check: what was published is reported."""

    def work(pipe: BodyPipe) -> str:
        try:
            while True:
                pipe.read(1)
                pipe.check()
        except BodyAborted:
            return "published"

    async def run() -> str:
        async with Upload(request_of([GONE]), executor, 10) as upload:
            return await upload.run(work)

    assert asyncio.run(run()) == "published"


def test_cancellation_waits_for_the_thread(executor: ThreadPoolExecutor) -> None:
    ended = threading.Event()

    def work(pipe: BodyPipe) -> None:
        try:
            pipe.read()
        finally:
            time.sleep(0.1)
            ended.set()

    async def run() -> None:
        async with Upload(request_of([PART]), executor, 10) as upload:
            await upload.run(work)

    async def cancelled() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(cancelled())


def records(client: ContractClient, vm: str) -> int:
    found: int = client.get(f"{vm}/counters").json()["counters"]["records"]
    return found


@pytest.mark.parametrize("media", ["application/octet-stream", "application/vnd.apache.parquet"])
def test_a_client_that_leaves_mid_body_changes_nothing(
    vm: str, service: Running, client: ContractClient, media: str
) -> None:
    client.put(f"{vm}/subpages?gfn=2", json={"access": [0]})
    query = "?record=gpa8" if media == "application/octet-stream" else ""
    content = gpa8([0x2000] * 10_000).content
    head = f"POST {vm}/traces{query} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media}\r\n"
    head += "Content-Length: 160000\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(head.encode() + content)
    time.sleep(0.2)
    connection.close()
    # The lock is free again, and nothing has happened.
    assert client.put(f"{vm}/subpages?gfn=3", json={"access": [0]}).status_code == 204
    assert records(client, vm) == 0 and client.get(f"{vm}/traces").json()["traces"] == []
    reply = client.post(
        f"{vm}/traces?record=gpa8", content=content, headers={"Content-Type": "application/octet-stream"}
    )
    assert reply.status_code == 201 and records(client, vm) == 10_000
