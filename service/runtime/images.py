"""Loading a memory image: a body of any length goes into a machine while it arrives, and is committed as one change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.requests import Request

from engine.images import open_image
from engine.images.base import Block, VcpuRegisters
from engine.machine import VirtualMachine
from service.runtime.bodies import BodyPipe, Upload
from service.runtime.commit_hooks import CommitHooks
from service.runtime.entry import Entry
from service.runtime.replays import Replaying
from service.runtime.room import Room
from service.settings import Settings

# Frames that a machine may grow by before they are held for it.
_STEP = 1 << 12


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """What was loaded: bytes of ``size`` in ``ranges`` (first address, size), ``pages_kept`` that are not all zeros."""

    format: str
    size: int
    pages_kept: int
    ranges: list[tuple[int, int]]
    vcpus: tuple[VcpuRegisters, ...]


async def load_image(
    entry: Entry,
    request: Request,
    format: str,
    gpa: int | None,
    replaying: Replaying,
    settings: Settings,
    hooks: CommitHooks,
    check: Callable[[VirtualMachine], None],
) -> LoadedImage:
    """Load the body of ``request`` while it arrives. ``check`` is called with the machine held, and may refuse.

    Raises what the reader, the machine and ``Entry.mutation`` raise; then the machine is as it was.
    """
    turn = replaying.turns.of(entry.tenant)
    with replaying.places.place(entry.tenant):
        async with Upload(request, replaying.executor, settings.body_queue_bytes, turn) as upload:
            await upload.begun()
            async with entry.mutation(hooks, image=True) as change:
                machine = change.machine
                check(machine)
                hold = _holding(entry.room)
                return await upload.run(lambda pipe: _load(machine, pipe, format, gpa, hold))


def _holding(room: Room) -> Callable[[int], None]:
    """For the thread that loads: hold what the machine has grown to, so that nobody else is promised it."""
    loop = asyncio.get_running_loop()
    held = 0

    async def hold(frames: int) -> None:
        room.hold(frames)

    def grown(frames: int) -> None:
        nonlocal held
        if frames >= held + _STEP:
            asyncio.run_coroutine_threadsafe(hold(frames), loop).result()
            held = frames

    return grown


def _load(
    machine: VirtualMachine, pipe: BodyPipe, format: str, gpa: int | None, grown: Callable[[int], None]
) -> LoadedImage:
    image = open_image(format, pipe, gpa)

    def blocks() -> Iterator[Block]:
        yield from image
        pipe.check()

    loaded = machine.load_image(blocks(), grown)
    return LoadedImage(image.format, loaded.size, loaded.pages_kept, image.ranges.all(), image.vcpus)
