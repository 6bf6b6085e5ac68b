"""Limits that tenants share, and the turns of those that compute."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter

import pytest

from service.problems import describe
from service.runtime.bodies import PIECE, BodyAborted, BodyPipe
from service.runtime.shares import Share, ShareExceeded
from service.runtime.turns import Turns


def share(most: int, tenants: int, *, firm: bool = False) -> Share:
    return Share("max_things", most, "things may exist", lambda: tenants, firm=firm)


def test_one_tenant_has_all() -> None:
    limit = share(5, 1)
    limit.take("red", 5)
    with pytest.raises(ShareExceeded) as refused:
        limit.take("red")
    problem, headers = describe(refused.value, "/")
    assert problem["status"] == 429 and problem["detail"] == "max_things: at most 5 things may exist (got 5)"
    assert (problem["limit"], problem["limit_of"]) == ("max_things", "service") and headers["Retry-After"]


def test_others_find_their_part() -> None:
    limit = share(12, 3)
    assert limit.room("red") == 12 - 2 - 2
    limit.take("red", 8)
    assert [limit.room(name) for name in ("red", "blue", "green")] == [0, 2, 2]
    with pytest.raises(ShareExceeded) as refused:
        limit.take("red")
    assert refused.value.members == {"limit": "max_things", "limit_of": "tenant"}
    limit.take("blue", 2)
    assert [limit.room(name) for name in ("red", "blue", "green")] == [0, 0, 2]
    limit.count("red", -3)
    assert [limit.room(name) for name in ("red", "blue", "green")] == [3, 3, 5]


@pytest.mark.parametrize(("firm", "room"), [(False, 3), (True, 0)])
def test_one_that_comes_late(firm: bool, room: int) -> None:
    known = 1
    limit = Share("max_things", 12, "things", lambda: known, firm=firm)
    limit.take("red", 12)
    known = 2
    assert limit.room("blue") == room and limit.room("red") <= 0


def test_nobody_takes_what_is_kept_for_others() -> None:
    """Whatever was taken before: each tenant may take at least its part, and together never more than there is."""
    chance = random.Random(7)
    for _ in range(200):
        tenants, most = chance.randrange(1, 6), chance.randrange(0, 60)
        limit, names = share(most, tenants), [f"t{number}" for number in range(tenants)]
        for _ in range(40):
            name = chance.choice(names)
            wanted = chance.randrange(1, 9)
            if limit.room(name) >= wanted:
                limit.take(name, wanted)
            elif limit.of(name):
                limit.count(name, -chance.randrange(1, limit.of(name) + 1))
            assert limit.used <= most
            part = most // (2 * tenants) if tenants > 1 else 0
            assert all(limit.room(other) >= part - limit.of(other) for other in names)


def test_turns_go_from_tenant_to_tenant() -> None:
    turns = Turns(share(1, 2))
    order: list[str] = []
    for tenant in ("red", "red", "red", "blue", "blue"):
        turns.ask(tenant).add_done_callback(lambda _, tenant=tenant: order.append(tenant))
    for _ in range(5):
        turns.give(order[-1])
    assert order == ["red", "blue", "red", "blue", "red"]


def test_a_turn_that_nobody_waits_for_any_more() -> None:
    async def run() -> None:
        turns = Turns(share(1, 1))
        first, second, third = (turns.of("red") for _ in range(3))
        await first.take()
        given_up = asyncio.create_task(second.take())
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        first.give()
        await asyncio.wait_for(third.take(), 5)
        # Given at the moment in which the one who waits is cancelled.
        late = asyncio.create_task(second.take())
        await asyncio.sleep(0)
        third.give()
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        await asyncio.wait_for(first.take(), 5)
        first.give()
        first.give()  # not held: nothing
        assert turns.ask("red").done()

    asyncio.run(run())


def test_nobody_stays_in_the_line_who_left_it() -> None:
    """A thousand clients that leave while the turn is another's leave nothing behind."""

    async def run() -> None:
        turns = Turns(share(1, 2))
        first, rested = turns.of("red"), turns.of("blue")
        await first.take()
        waits = [asyncio.create_task(turns.of("blue").take()) for _ in range(1000)]
        await asyncio.sleep(0)
        again = asyncio.get_running_loop().run_in_executor(None, rested.again)
        while len(turns._waiting["blue"]) <= len(waits):  # noqa: ASYNC110 - a thread comes to it
            await asyncio.sleep(0.001)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        rested.abandon()
        assert not await again and not turns._waiting
        first.give()

    asyncio.run(run())


def test_a_reader_rests_without_its_turn() -> None:
    """While the body does not come another has the turn; the reader goes on when a piece is there."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        turns = Turns(share(1, 1))
        mine, other = turns.of("red"), turns.of("blue")
        await mine.take()
        pipe = BodyPipe(loop, 8 * PIECE, mine)
        pipe.widen()
        reading = loop.run_in_executor(None, pipe.read)
        await pipe.feed(b"a" * 10)
        await asyncio.wait_for(other.take(), 10)
        await pipe.feed(b"b" * PIECE)
        assert not mine.held
        other.give()
        for _ in range(20):
            await pipe.feed(b"c" * PIECE)
        pipe.end()
        assert Counter(await reading) == {97: 10, 98: PIECE, 99: 20 * PIECE}
        mine.give()
        assert turns.ask("red").done()

    asyncio.run(run())


def test_a_reader_that_rests_is_told_of_the_end() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        turns = Turns(share(1, 1))
        for waits_for_turn in (False, True):
            mine, other = turns.of("red"), turns.of("blue")
            await mine.take()
            pipe = BodyPipe(loop, 8, mine)
            reading = loop.run_in_executor(None, pipe.read, 8)
            await asyncio.wait_for(other.take(), 10)
            if waits_for_turn:
                await pipe.feed(b"12345678")
            pipe.abort()
            with pytest.raises(BodyAborted):
                await reading
            other.give()
        assert turns.ask("red").done() and threading.active_count() > 0

    asyncio.run(run())
