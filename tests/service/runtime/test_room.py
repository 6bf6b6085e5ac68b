"""What the frames of one machine may take: its own limits, and its tenant's part of the service's."""

from __future__ import annotations

import pytest

from engine.errors import LimitExceeded
from service.runtime.room import Room
from service.runtime.shares import Share, ShareExceeded

FRAME = 4096


class Machine:
    """As much of a machine as a room looks at."""

    def __init__(self, frames: int, images: int = 0) -> None:
        self.frames_in_use = frames
        self.image_frames = images
        self.most = 0

    def bound_frames(self, most: int) -> None:
        self.most = most


def bound(room: Room, machine: Machine, *, image: bool = False) -> int:
    room.open(machine, image=image)  # type: ignore[arg-type]
    return machine.most


def share(frames: int = 1000) -> Share:
    return Share("max_memory_bytes", frames * FRAME, "bytes")


def test_images_have_frames_of_their_own() -> None:
    room = Room(share(), "red", 100, 50)
    assert bound(room, Machine(10)) == 100
    assert bound(room, Machine(10), image=True) == 150
    assert bound(room, Machine(60, images=30)) == 130, "others have as many as ever"
    assert bound(room, Machine(60, images=70)) == 150
    assert bound(room, Machine(170, images=70)) == 170, "what is there may stay"


def test_what_a_load_has_come_to_is_nobody_elses() -> None:
    memory = share(100)
    first, second = (Room(memory, "red", 1000, 1000) for _ in range(2))
    first.settle(10)
    second.settle(10)
    assert bound(first, Machine(10), image=True) == 90
    first.hold(60)
    first.hold(40)
    assert memory.used == 70 * FRAME
    assert bound(second, Machine(10), image=True) == 40
    with pytest.raises(ShareExceeded, match="at most 409600 bytes"):
        second.hold(41)
    second.hold(40)
    assert memory.used == 100 * FRAME and (first.used, second.used) == (10 * FRAME, 10 * FRAME)
    first.release()
    assert memory.used == 50 * FRAME
    second.settle(30)
    assert memory.used == 40 * FRAME and second.used == 30 * FRAME
    second.settle(0)
    first.settle(0)
    assert memory.used == 0


def test_refusals_name_whose_limit_it_was() -> None:
    for frames, image, limit in ((100, False, "max_table_frames"), (150, True, "max_image_memory_bytes")):
        room = Room(share(), "red", 100, 50)
        bound(room, Machine(10), image=image)
        with pytest.raises(ShareExceeded) as caught:
            room.check(Machine(frames + 1))  # type: ignore[arg-type]
        assert caught.value.members == {"limit": limit, "limit_of": "machine"}
        assert room.is_refusal(LimitExceeded("", field="max_table_frames"))
    room = Room(share(120), "red", 100, 50)
    bound(room, Machine(10), image=True)
    with pytest.raises(ShareExceeded) as caught:
        room.check(Machine(121))  # type: ignore[arg-type]
    assert caught.value.members["limit"] == "max_memory_bytes"
