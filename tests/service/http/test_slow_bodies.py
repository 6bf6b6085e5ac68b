"""How long a body may take to arrive: only waiting counts, and what has arrived buys more of it."""

from __future__ import annotations

import asyncio
import selectors

import pytest
from starlette.types import Message

from service.http.limits import punctual
from service.problems import BodyTooSlow


class Clock(selectors.SelectSelector):
    """Time that passes only when everybody waits, and then at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop that goes by such a clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def arrivals(*parts: tuple[float, int], between: float = 0.0, seconds: float = 0.2, rate: int = 1000) -> int:
    """Read a body whose parts arrive so many seconds after they are asked for; the bytes read."""
    waiting = list(parts)

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(3 * seconds)
            return {"type": "http.disconnect"}
        delay, size = waiting.pop(0)
        await asyncio.sleep(delay)
        return {"type": "http.request", "body": bytes(size), "more_body": bool(waiting)}

    async def run() -> int:
        reading, seen = punctual(receive, seconds, rate), 0
        while (message := await reading())["type"] == "http.request":
            seen += len(message["body"])
            await asyncio.sleep(between)
        return seen

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(run())


def test_in_time() -> None:
    assert arrivals((0, 10), (0.01, 10), (0, 0)) == 20


def test_the_end_of_the_body_ends_the_clock() -> None:
    """Waiting for the client to leave, which a replay does, takes as long as it takes."""
    assert arrivals((0, 1), seconds=0.01) == 1


def test_what_arrives_buys_time() -> None:
    """0.6 s of waiting, of which 0.2 are free and 0.5 bought."""
    assert arrivals((0.15, 250), (0.15, 250), (0.15, 0), (0.15, 0)) == 500


@pytest.mark.parametrize("parts", [((5, 1),), ((0.12, 1), (0.12, 1), (0.12, 1)), ((0.1, 100), (5, 0))])
def test_too_slow(parts: tuple[tuple[float, int], ...]) -> None:
    with pytest.raises(BodyTooSlow, match=r"must arrive within 0\.2 seconds and one more for each 1000 bytes"):
        arrivals(*parts)


def test_time_in_which_nobody_reads_does_not_count() -> None:
    assert arrivals((0, 1), (0.01, 1), (0.01, 1), between=0.2, seconds=0.1) == 3


def test_what_is_here_and_what_is_waited_for() -> None:
    """What is here is taken at once; what is waited for has its time, is interrupted with who asks, and may fail."""
    told: list[str] = []

    async def run() -> None:
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def receive() -> Message:
            try:
                piece = await pieces.get()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise
            if piece is None:
                raise OSError("gone")
            await asyncio.sleep(0)
            return {"type": "http.request", "body": piece, "more_body": True}

        arriving = punctual(receive, 0.05, 1)
        pieces.put_nowait(b"x" * 9)
        assert (await arriving())["body"] == b"x" * 9  # brings nine seconds more
        asyncio.get_running_loop().call_later(0.1, pieces.put_nowait, b"late")
        assert (await arriving())["body"] == b"late"
        task = asyncio.ensure_future(arriving())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pieces.put_nowait(None)
        with pytest.raises(OSError, match="gone"):
            await arriving()
        with pytest.raises(BodyTooSlow):
            await punctual(receive, 0.01, 1)()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(run())
    assert told == ["cancelled", "cancelled"]
