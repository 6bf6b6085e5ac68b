"""Bodies reduced to footprints, and footprints that are bodies."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.errors import EngineError
from engine.footprint import stored
from engine.footprint.build import Builder
from engine.footprint.places import Footprint, Origin
from engine.trace.columns import TraceChunk
from engine.trace.readers import Budget
from service.runtime.footprint_builds import FootprintRequest, build
from tests.abuse.bodies import parquet
from tests.abuse.footers import refooted, rows, values

PLACES = 1000


class Stopped(Exception):
    """Nobody wants it any more."""


def nothing() -> None:
    """Go on."""


@pytest.fixture(scope="module")
def body() -> bytes:
    """A footprint as a file."""
    builder = Builder("bytes")
    rows = np.array([[at * 8, 8 | 1 << 16] for at in range(PLACES)], dtype=np.uint64)
    builder.feed(TraceChunk(rows, None, {}))
    sink = io.BytesIO()
    stored.write(builder.finish(Origin("00" * 32, 0, "packed", ("gpa",))), sink)
    return sink.getvalue()


def made(body: bytes, check: Callable[[], None] = nothing, room: Budget | None = None, **request: Any) -> Footprint:
    wanted = FootprintRequest("parquet", **request)
    return build(wanted, io.BytesIO(body), check, Budget(1 << 26), room or Budget(1 << 26))


@pytest.mark.parametrize("given", [{"name": "n"}, {"columns": "gpa=a"}, {"skip_unknown": True}, {"address": "flat"}])
def test_of_a_footprint_nothing_is_asked_that_is_about_a_trace(body: bytes, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(EngineError, match="the body is a footprint") as refused:
        made(body, **given)
    assert refused.value.field == name
    assert len(made(body)) == PLACES and len(made(body, level="spans")) == PLACES // 16 + 1


def test_memory_is_asked_for_before_a_footprint_becomes_coarser(body: bytes) -> None:
    taken: list[int] = []
    made(body, room=Budget(1 << 26, taken.append), level="spans")
    assert sum(taken) > PLACES * (stored.PLACE_BYTES + 190)


@pytest.mark.parametrize("trace", [False, True])
def test_a_body_that_nobody_wants_is_not_read_on(body: bytes, trace: bool) -> None:
    """Neither while a trace is hashed, of which nothing else is heard for as long, nor while a footprint is read."""
    if trace:
        body = parquet(pa.table({"gpa": pa.array(range(PLACES), pa.uint64())}))
    seen: list[int] = []

    class Source(io.BytesIO):
        def readinto(self, target: Any) -> int:
            seen.append(len(target))
            return super().readinto(target)

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        build(FootprintRequest("parquet"), Source(body), check, Budget(1 << 26), Budget(1 << 26))
    assert not seen


@pytest.mark.parametrize("lie", [rows(0), rows(1), rows(-(1 << 60)), values(1), values(-1), values(1 << 30)])
def test_a_footprint_that_lies_about_its_length_is_refused(body: bytes, lie: Callable[[Any], None]) -> None:
    memory = Budget(1 << 26)
    with pytest.raises(EngineError):
        made(refooted(body, lie), room=memory)
    assert memory.kept >= 0
