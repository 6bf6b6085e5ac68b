"""What a thread works out for a client ends with the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from service.app import _replaying
from service.runtime.replays import Replaying
from service.settings import Settings

_ENOUGH = 60


def endless(check: Callable[[], None]) -> None:
    began = time.monotonic()
    while time.monotonic() < began + _ENOUGH:
        check()
        time.sleep(0.001)


async def computed(replaying: Replaying, leaves: asyncio.Event) -> None:
    async def receive() -> dict[str, Any]:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async with replaying.computing("red"):
        await replaying.compute(Request({"type": "http"}, receive), 0, endless)


@pytest.mark.parametrize("cancelled", [False, True])
def test_work_ends_when_its_client_leaves_or_is_given_up(cancelled: bool) -> None:
    async def run() -> None:
        settings, leaves = Settings(store="memory"), asyncio.Event()
        with ThreadPoolExecutor(1) as executor:
            replaying = _replaying(settings, executor, Idle(), lambda: 1)  # type: ignore[arg-type]
            task = asyncio.get_running_loop().create_task(computed(replaying, leaves))
            await asyncio.sleep(0.05)
            if cancelled:
                task.cancel()
            else:
                leaves.set()
            with pytest.raises(asyncio.CancelledError if cancelled else ClientDisconnect):
                await task
            assert not replaying.places.used

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < _ENOUGH / 2


class Idle:
    """What jobs lend to calls, which these do not need."""

    spools = memory = None
