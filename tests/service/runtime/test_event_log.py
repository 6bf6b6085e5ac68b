"""The log by itself: what is committed, given up and found anew, how old rows go, and how many readers are woken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.errors import NotFound
from engine.machine import SubpageRange
from engine.trace.results import ExitColumns
from service.runtime.batches import Parts
from service.runtime.changes import of_ioctl, subpages_set
from service.runtime.events import EventLog, Note
from service.runtime.traces import NO_RECORDS
from service.storage.records import EventRecord


def add(log: EventLog, count: int = 1) -> None:
    log.stage([Note("flush", {}, count)])
    log.coming()
    log.settle()


def test_what_was_given_up_takes_no_id() -> None:
    async def run() -> None:
        log = EventLog(kept=10)
        log.note("flush", {"vcpu": 1})
        log.stage()
        change, next_id = log.coming()
        assert (len(change.events), next_id, log.next_id) == (1, 2, 1) and await log.rows(0, 10) == []
        log.discard()
        log.settle()
        assert log.next_id == 1 and not log.coming()[0].events
        add(log, 5)
        assert [(row.first, row.count) for row in await log.rows(0, 10)] == [(1, 5)]

    asyncio.run(run())


def test_a_log_that_was_longer_than_it_seemed() -> None:
    """A commit whose outcome was not known turns out to have been made."""
    asked: list[tuple[int, int, str, int]] = []

    async def load(*which: Any) -> list[EventRecord]:
        asked.append(which)
        return []

    async def run() -> None:
        log = EventLog(kept=10, load=load)
        add(log)
        assert await log.rows(0, 5) and not asked
        waiting = asyncio.create_task(log.wait(1, 60.0))
        await asyncio.sleep(0)
        log.adopt(4)
        assert await waiting and log.next_id == 4
        assert await log.rows(0, 5) == [] and asked == [(0, 4, "", 5)]

    asyncio.run(run())


def test_old_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        log = EventLog(kept=10, kept_days=1)
        add(log)
        monkeypatch.setattr("service.runtime.events.stamp", lambda when=None: "9999" if when is None else "5000")
        add(log)
        assert [row.first for row in await log.rows(0, 10)] == [2]

    asyncio.run(run())


def test_all_readers_are_woken_and_some_leave() -> None:
    async def run() -> None:
        log = EventLog(kept=10)
        waiting = [asyncio.create_task(log.wait(0, 60.0)) for _ in range(300)]
        impatient = asyncio.create_task(log.wait(0, 0.001))
        assert not await impatient
        waiting[7].cancel()
        await asyncio.sleep(0)
        add(log)
        waiting[8].cancel()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert done.count(True) == 298 and await log.wait(0, 60.0)
        log.close("deleted")
        log.close("draining")
        assert log.ended == "deleted" and await log.wait(5, 60.0)

    asyncio.run(run())


def test_readers_of_one_part_share_it_and_failures_are_not_kept() -> None:
    loads = 0

    async def load(number: int, trace: str, part: int) -> ExitColumns:
        nonlocal loads
        loads += 1
        await asyncio.sleep(0)
        if loads == 1:
            raise NotFound("gone")
        return NO_RECORDS

    async def run() -> None:
        parts = Parts(load)
        failed = await asyncio.gather(*(parts.get(1, "t", 0) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in failed] == [NotFound] * 3 and loads == 1
        leaving = asyncio.create_task(parts.get(1, "t", 0))
        staying = asyncio.create_task(parts.get(1, "t", 0))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying is NO_RECORDS and loads == 2
        for part in range(20):
            await parts.get(1, "t", part)
        assert loads == 21, "the first was there already"
        await parts.get(1, "t", 0)
        assert loads == 22, "and has been forgotten"

    asyncio.run(run())


def test_long_lists_are_cut() -> None:
    told = subpages_set([SubpageRange(gfn, 2, 0) for gfn in range(100)])
    assert len(told["ranges"]) == 64 and (told["ranges_total"], told["pages"]) == (100, 200)


@pytest.mark.parametrize(
    ("returns", "errno", "pages"), [(3, None, 3), (-1, "EFAULT", 0), (-1, "EINVAL", None), (0, None, None)]
)
def test_set_access_that_failed(returns: int, errno: str | None, pages: int | None) -> None:
    """EFAULT may come after some pages; what was refused outright did nothing."""
    content = (5).to_bytes(8, "little") + (3).to_bytes(8, "little")
    note = of_ioctl("KVM_SUBPAGES_SET_ACCESS", None, content, returns, errno)
    assert (note.detail["pages"] if note is not None else None) == pages
    assert of_ioctl("KVM_SUBPAGES_SET_ACCESS", None, b"", 1, None) is None
    assert of_ioctl("KVM_INIT_SPP", None, content, 0, None) is None
