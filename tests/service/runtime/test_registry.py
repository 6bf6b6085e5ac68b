"""The registry: what machines take while they are created."""

from __future__ import annotations

import asyncio

import pytest

from engine.machine import VirtualMachine
from engine.state.config import VmConfig
from service.problems import StoreUnavailable
from service.runtime.commit_hooks import CommitHooks
from service.runtime.registry import Entry, Registry
from service.runtime.repository import NO_LOG, Repository
from service.runtime.shares import ShareExceeded
from service.settings import MIB, Settings
from service.storage.records import LogChange, VmRecord

MANY = 400


class SlowRepository(Repository):
    """A store that commits when it is told to, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.told = asyncio.Event()
        self.away = False

    async def create(
        self, record: VmRecord, machine: VirtualMachine, log: LogChange = NO_LOG, hooks: CommitHooks = ()
    ) -> None:
        await self.told.wait()
        if self.away:
            raise StoreUnavailable("away", certain=True)


@pytest.mark.parametrize("away", [False, True])
def test_machines_under_creation_count(away: bool) -> None:
    """However many are created at a time, they take no more together than they may; what fails gives it back."""

    async def run() -> None:
        repository = SlowRepository()
        registry = Registry(Settings(max_memory_bytes=MIB, max_vms=MANY), repository)

        async def create() -> Entry:
            return await registry.create(VmConfig(), (), spp=True, tenant="red", hooks=())

        coming = [asyncio.create_task(create()) for _ in range(MANY)]
        await asyncio.sleep(0)
        repository.away = away
        repository.told.set()
        made = await asyncio.gather(*coming, return_exceptions=True)
        refused = [error for error in made if isinstance(error, ShareExceeded)]
        assert refused and refused[0].members == {"limit": "max_memory_bytes", "limit_of": "service"}
        assert sum(isinstance(entry, Entry) for entry in made) == (0 if away else MANY - len(refused))
        used = sum(entry.room.used for entry in registry.all())
        assert registry._memory.used == used <= MIB
        registry.leave()
        assert registry._memory.used == registry._places.used == 0

    asyncio.run(run())
