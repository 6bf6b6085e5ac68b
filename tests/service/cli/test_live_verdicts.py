"""What holds a guest that is watched live, against a service and a recording that is none."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import subpage
from capture.recording import Recording
from service.cli.connection import Service
from service.cli.live_verdicts import Verdicts
from service.settings import Settings
from tests.support.server import Running, running


class Guest:
    """Stands in for a recording: a guest with a hole in its memory, and what was said of it."""

    guest = SimpleNamespace(ranges=((0, 0x10000), (0x20000, 0x10000)))

    def __init__(self) -> None:
        self.guards: list[NDArray[np.uint32]] = []

    def guard(self, masks: NDArray[np.uint32]) -> None:
        self.guards.append(masks)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Settings(warm_up=False)) as started:
        yield started


@pytest.fixture
def vm(server: Running) -> Iterator[subpage.Vm]:
    slots = [{"slot": n, "gpa": hex(gpa), "size": hex(size)} for n, (gpa, size) in enumerate(Guest.guest.ranges)]
    with subpage.Client(server.url) as client:
        yield client.vm(client.call("createVm", json={"memory_slots": slots, "spp": True}).json()["id"])


def verdicts(server: Running, vm: subpage.Vm, guest: Any) -> Verdicts:
    return Verdicts(Service(server.url), vm, cast(Recording, guest))


def test_what_is_protected_is_guarded_on_both_sides_of_a_hole(server: Running, vm: subpage.Vm) -> None:
    vm.protect([{"name": "low", "gpa": 0x1080, "size": 8}, {"name": "high", "gpa": 0x2F000, "size": 8}], name="policy")
    guest = Guest()
    verdicts(server, vm, guest)
    (masks,) = guest.guards
    assert {page: int(mask) for page, mask in enumerate(masks) if mask} == {1: 1 << 1, 0x2F: 1}
    assert len(masks) == 0x30
