"""Coded request bodies: gzip and zstd, whole and in pieces, broken, and far larger than they look."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zstandard
from starlette.types import Message

from engine.trace import compressed
from service.http.codings import CODINGS, decoded
from service.problems import BodyTooLarge, ServiceError
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.server import Running, running

ENCODE: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
PLAIN = bytes(range(256)) * 5000


def read(coding: str, chunks: list[bytes], limit: int = 1 << 24) -> list[bytes]:
    """What a route reads of a body that arrives as ``chunks``."""
    waiting = iter(chunks)
    left = len(chunks)

    async def receive() -> Message:
        nonlocal left
        left -= 1
        if left < 0:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": next(waiting), "more_body": left > 0}

    async def run() -> list[bytes]:
        reading, pieces = decoded(receive, coding, limit), []
        while (message := await reading())["type"] == "http.request":
            pieces.append(message["body"])
            if not message["more_body"]:
                assert (await reading())["type"] == "http.disconnect"
                return pieces
        raise EOFError

    return asyncio.run(run())


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_any_chunking(coding: str, size: int) -> None:
    content = ENCODE[coding](PLAIN)
    chunks = [content[first : first + size] for first in range(0, len(content), size)]
    assert b"".join(read(coding, chunks)) == PLAIN
    assert b"".join(read(coding, [b"", *chunks, b""])) == PLAIN


@pytest.mark.parametrize("coding", list(CODINGS))
def test_several_members(coding: str) -> None:
    content = ENCODE[coding](b"one") + ENCODE[coding](b"") + ENCODE[coding](b"two" * 1000)
    for chunks in ([content], [content[:20], content[20:]], [bytes([byte]) for byte in content]):
        assert b"".join(read(coding, chunks)) == b"one" + b"two" * 1000


@pytest.mark.parametrize("coding", list(CODINGS))
def test_parts_without_content_are_counted(coding: str) -> None:
    """Twenty bytes each, and nothing is decoded that a limit could count."""
    few = ENCODE[coding](b"one") + ENCODE[coding](b"") * 200 + ENCODE[coding](b"two")
    assert b"".join(read(coding, [few])) == b"onetwo"
    with pytest.raises(ServiceError, match="without content") as caught:
        read(coding, [ENCODE[coding](b"") * 20_000])
    assert caught.value.code == "malformed-body"


@pytest.mark.parametrize("coding", list(CODINGS))
def test_broken_bodies(coding: str) -> None:
    content = ENCODE[coding](PLAIN)
    for broken in (b"", b"x", content[:-1], content[:10], content + b"x", content[:50] + b"\xff" * 50 + content[100:]):
        with pytest.raises(ServiceError) as caught:
            read(coding, [broken])
        assert caught.value.code == "malformed-body"


@pytest.mark.parametrize("coding", list(CODINGS))
def test_a_client_that_leaves(coding: str) -> None:
    with pytest.raises(EOFError):
        read(coding, [])


@pytest.mark.parametrize("coding", list(CODINGS))
def test_pieces_are_bounded(coding: str) -> None:
    """64 MiB out of a few KiB: in pieces, and no further than the limit."""
    bomb = ENCODE[coding](bytes(64 << 20))
    assert len(bomb) < 1 << 17
    pieces = read(coding, [bomb], 1 << 26)
    assert sum(map(len, pieces)) == 64 << 20 and max(map(len, pieces)) <= 8 << 20
    for limit in (0, 1 << 20, (64 << 20) - 1):
        with pytest.raises(BodyTooLarge, match=str(limit)):
            read(coding, [bomb], limit)


@pytest.mark.parametrize("coding", list(CODINGS))
def test_the_event_loop_does_not_decode(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece that a decoder hands over may wait for the GIL: at a bomb's start /livez waited 300 ms."""
    by = set[int]()

    class Watched(CODINGS[coding]):  # type: ignore[misc]
        def feed(self, data: bytes) -> Iterator[bytes]:
            for piece in super().feed(data):
                by.add(threading.get_ident())
                yield piece

    monkeypatch.setitem(CODINGS, coding, Watched)
    assert b"".join(read(coding, [ENCODE[coding](PLAIN)])) == PLAIN
    assert by and threading.get_ident() not in by


@pytest.mark.parametrize("coding", list(CODINGS))
def test_what_little_may_become_is_bounded(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand times what was sent, and a small body anything."""
    monkeypatch.setattr(compressed, "ANYWAY", 1 << 20)
    noise = random.Random(1).randbytes(1 << 12)
    for content, size in ((bytes(1 << 20), 1 << 20), (noise + bytes(3 << 20), (3 << 20) + len(noise))):
        assert sum(map(len, read(coding, [ENCODE[coding](content)], 1 << 26))) == size
    bomb = b"".join(ENCODE[coding](bytes(64 << 20)) for _ in range(2))
    if coding == "zstd":  # what gzip can do is not more
        with pytest.raises(BodyTooLarge, match="1000 times"):
            read(coding, [bomb], 1 << 30)


def test_output_that_waits_behind_used_up_input() -> None:
    """A match may end exactly at the bound of a piece while nothing of the input is left."""
    for size in ((1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 19):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        assert len(b"".join(read("gzip", [packer.compress(bytes(size)) + packer.flush()]))) == size


def test_zstd_windows_are_bounded() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    content = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(ServiceError):
        read("zstd", [content.compress(PLAIN) + content.flush()])


@pytest.mark.parametrize("coding", list(CODINGS))
def test_over_http(client: ContractClient, make_vm: Callable[..., str], coding: str) -> None:
    vm = make_vm()
    headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": coding}
    lines = b"".join(b'{"gpa": %d}\n' % (8 * number) for number in range(20_000))

    def pieces() -> Iterator[bytes]:
        content = ENCODE[coding](lines)
        for first in range(0, len(content), 1000):
            yield content[first : first + 1000]

    for content in (ENCODE[coding](lines), pieces()):
        reply = client.post(f"{vm}/traces", content=content, headers=headers)
        assert reply.status_code == 201 and reply.json()["records"] == 20_000
    document = ENCODE[coding](json.dumps({"active": True}).encode())
    reply = client.put(f"{vm}/spp", content=document, headers={**headers, "Content-Type": "application/json"})
    assert reply.status_code == 200
    reply = client.post(f"{vm}/traces", content=ENCODE[coding](lines)[:-5], headers=headers)
    assert reply.status_code == 400 and reply.json()["field"] == "body"
    assert client.get(f"{vm}/counters").json()["counters"]["records"] == 40_000, "the broken body changed nothing"


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with running(Settings(warm_up=False, max_document_bytes=1 << 12, max_body_bytes=1 << 16)) as service:
        yield service


@pytest.mark.parametrize("coding", list(CODINGS))
def test_bombs_over_http(small: Running, coding: str) -> None:
    home = small.client.post("/v1/vms", json={"memory_slots": [{"slot": 0, "gpa": 0, "size": 4096}]}).headers[
        "Location"
    ]
    bomb: dict[str, Any] = {"name": " " * (1 << 20)}
    for path, media in (("/v1/vms", "application/json"), (f"{home}/traces", "application/x-ndjson")):
        headers = {"Content-Type": media, "Content-Encoding": coding}
        reply = small.client.post(path, content=ENCODE[coding](json.dumps(bomb).encode()), headers=headers)
        assert reply.status_code == 413 and "when decoded" in reply.json()["rule"]
    small.client.delete(home)
