"""Footprints that come at one time are kept within limits, in the order of their commits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from pydantic import ValidationError

from engine.footprint.places import SPANS
from service.runtime.footprints import Footprints
from service.runtime.repository import Repository
from service.settings import MIB, Settings
from service.storage.records import Side
from tests.engine.footprint.asking import footprint_of, scene

ONE = footprint_of(scene(0, "kvm-2019").records, SPANS)


def test_those_beside_replays_and_others_count_each_other() -> None:
    async def run() -> None:
        footprints = Footprints(Settings(store="memory", kept_footprints=2), Repository())
        order = []

        async def beside(seconds: float) -> None:
            async with footprints.coming("red", ONE, "vm") as side:
                await asyncio.sleep(seconds)  # the commit
                footprints.settle(side)
                order.append(side.footprints[0])

        async def alone() -> None:
            order.append(await footprints.add("red", ONE, ()))

        await asyncio.gather(beside(0.05), beside(0), alone(), beside(0.01), alone())
        found, following = await footprints.page("red", 0, 10)
        assert found == order[-2:] and following is None
        moments = [record.created for record in order]
        assert moments == sorted(moments)

    asyncio.run(run())


def test_a_tenant_does_not_wait_for_another() -> None:
    async def run() -> None:
        footprints = Footprints(Settings(store="memory"), Repository())
        async with footprints.coming("red", ONE), asyncio.timeout(60):
            await footprints.add("blue", ONE, ())

    asyncio.run(run())


def test_those_whose_days_are_over_go_whoever_comes() -> None:
    async def run() -> None:
        footprints = Footprints(Settings(store="memory", kept_footprint_days=1), Repository())
        old = await footprints.add("red", ONE, ())
        assert footprints._memory is not None
        footprints._memory.settle(Side(footprints=(replace(old, created="2001-01-01T00:00:00.000000Z"),)))
        new = await footprints.add("blue", ONE, ())
        assert set(footprints._memory._records) == {new.id}

    asyncio.run(run())


def test_one_that_is_dropped_while_it_is_asked_does_not_stay() -> None:
    async def run() -> None:
        footprints = Footprints(Settings(store="memory"), Repository())
        record = await footprints.add("red", ONE, ())
        async with footprints.asked("red", record.id):
            await footprints.delete("red", record.id, ())
        assert not footprints._loaded and not footprints.memory.used

    asyncio.run(run())


def test_one_may_not_have_more_than_all() -> None:
    with pytest.raises(ValidationError, match="at most max_footprint_memory_bytes"):
        Settings(store="memory", footprint_memory_bytes=2 * MIB, max_footprint_memory_bytes=MIB)
