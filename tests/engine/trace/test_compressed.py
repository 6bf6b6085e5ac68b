"""Bodies of tools that are compressed files."""

from __future__ import annotations

import gzip
import io
import lzma

import pytest
import zstandard

from engine.errors import TraceError
from engine.trace.columns import MalformedBody
from engine.trace.readers import open_trace

PACK = {"gzip": gzip.compress, "xz": lzma.compress, "zstd": zstandard.ZstdCompressor().compress}
LINE = b" S 00004010,8\n"


def read_all(body: bytes, **options) -> int:
    return sum(len(chunk.records) for chunk in open_trace("auto", io.BytesIO(body), **options))


@pytest.mark.parametrize("name", PACK)
def test_files_are_read_as_what_is_in_them(name: str) -> None:
    assert read_all(PACK[name](LINE * 3000)) == 3000
    assert read_all(PACK[name](LINE) + PACK[name](LINE)) == 2
    assert read_all(PACK[name](b"gpa,size\n1,2\n")) == 1


@pytest.mark.parametrize("name", PACK)
def test_files_that_are_not_whole(name: str) -> None:
    body = PACK[name](LINE * 50)
    with pytest.raises(MalformedBody, match=f"must be a complete {name} stream"):
        read_all(body[:-4])
    with pytest.raises(MalformedBody, match=f"must be a complete {name} stream"):
        read_all(body[:6] + bytes(range(100)))


@pytest.mark.parametrize("name", PACK)
def test_what_is_in_them_is_bounded(name: str) -> None:
    with pytest.raises(TraceError, match="must be at most 1000 bytes when decoded"):
        read_all(PACK[name](LINE * 3000), longest=1000)


def test_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.compressed.ANYWAY", 1 << 16)
    monkeypatch.setattr("engine.trace.compressed.RATIO", 20)
    with pytest.raises(TraceError, match="20 times what is sent"):
        read_all(gzip.compress(b"==1==\n" * 100_000 + LINE), longest=0)


def test_empty_parts_are_bounded() -> None:
    with pytest.raises(MalformedBody, match="without content"):
        read_all(lzma.compress(b"") * 300 + lzma.compress(LINE))
