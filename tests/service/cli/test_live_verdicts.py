"""What holds a guest that is watched live, against a service and a recording that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import subpage
from capture.recording import Recording
from service.cli.app import app
from service.cli.connection import Service
from service.cli.live_stream import Machine
from service.cli.live_verdicts import Verdicts
from service.settings import Settings
from tests.support.server import Running, running
from tests.support.waiting import until

runner = CliRunner()


class Guest:
    """Stands in for a recording: a guest with a hole in its memory, and what was said of it."""

    guest = SimpleNamespace(ranges=((0, 0x10000), (0x20000, 0x10000)))

    def __init__(self) -> None:
        self.guards: list[NDArray[np.uint32]] = []
        self.ended: list[tuple[str, bool]] = []
        self.held = 0

    def guard(self, masks: NDArray[np.uint32]) -> None:
        self.guards.append(masks)

    def end(self, word: str, *, failed: bool = False) -> None:
        self.ended.append((word, failed))


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


def test_guards_are_read_anew_after_a_change_and_not_otherwise(server: Running, vm: subpage.Vm) -> None:
    vm.protect([{"name": "object", "gpa": 0x1080, "size": 8}], name="policy")
    looking = verdicts(server, vm, guest := Guest())

    def after(step: Callable[[], object]) -> list[int]:
        del guest.guards[:]
        step()
        looking._look(vm)
        return [int(masks[1]) for masks in guest.guards]

    write = [{"gpa": "0x1080", "size": 8, "access": 1}]
    assert after(lambda: None) == []
    assert after(lambda: vm.replay(write)) == [], "a replay changes no bitmap"
    assert after(lambda: vm.set_subpages(1, 0xFFFFFFFE)) == [0b11]
    assert after(lambda: None) == []
    assert after(lambda: vm.replay(write, on_violation="grant")) == [0b01]
    assert after(lambda: vm.unprotect("policy")) == [0b01]


def test_a_guest_whose_verdicts_cannot_be_had_is_ended_and_not_let_go(server: Running, vm: subpage.Vm) -> None:
    guest = Guest()
    with verdicts(server, vm, guest).given():
        vm.delete()
        until(lambda: bool(guest.ended))
    ((word, failed),) = guest.ended
    assert word.startswith("verdicts do not come any more: 404: ") and failed


def test_a_guest_ends_where_it_stands_when_its_watcher_fails(server: Running, vm: subpage.Vm) -> None:
    guest = Guest()
    with pytest.raises(subpage.Unreachable), verdicts(server, vm, guest).given():
        raise subpage.Unreachable("the connection is lost")
    assert guest.ended == [("its stores are not judged any more", True)]
    with verdicts(server, vm, guest := Guest()).given():
        pass
    assert guest.ended == []


def test_names_that_a_guest_shows_command_no_terminal() -> None:
    machine = Machine(cast(Any, Hostile()), cast(Any, None), cast(Any, None))
    assert machine.writers({"id": "trace", "violations": 1})[1] == r"  secret: 1 writes by evil\x9b2J\x1b[2J [ü]"
    said = runner.invoke(app, ["live", "--policy", "\x1b]0;x", "--", "qemu"])
    assert said.exit_code == 1 and r"\x1b]0;x" in said.output and "\x1b]" not in said.output


class Hostile:
    """Stands in for a machine whose symbols a guest has made up."""

    def trace(self, name: str) -> Hostile:
        return self

    def exits(self) -> list[Any]:
        return [{"objects": ["secret"], "writer": "evil\x9b2J\x1b[2J [ü]"}]


class Stopped:
    """Stands in for a machine whose trace an answer has stopped: the connection is lost, or was not yet."""

    def __init__(self, at: int | None, *, lost: bool) -> None:
        self.document, self.id, self.lost = {"stopped_at": at}, "trace", lost

    def replay(self, *_: Any, **options: Any) -> Stopped:
        if self.lost:
            raise subpage.Unreachable("the connection is lost")
        return self

    def traces(self) -> list[Any]:
        return [SimpleNamespace(id="other", document={"stopped_at": None}), self]

    def trace(self, name: str) -> Stopped:
        assert name == self.id
        return self


@pytest.mark.parametrize("lost", [True, False])
def test_a_stop_is_the_end_of_the_guest_though_its_connection_ends_first(lost: bool) -> None:
    guest = Guest()
    machine = Machine(cast(Any, Stopped(1234, lost=lost)), cast(Any, None), cast(Any, None))
    result = machine.stream(cast(Recording, guest), cast(Any, None), "50ms", "ask")
    assert (result, guest.ended) == (
        {"stopped_at": 1234},
        [("the guest was stopped at record 1,234, as was answered", False)],
    )


def test_a_connection_that_is_lost_without_a_stop_is_told() -> None:
    machine = Machine(cast(Any, Stopped(None, lost=True)), cast(Any, None), cast(Any, None))
    with pytest.raises(subpage.Unreachable):
        machine.stream(cast(Recording, Guest()), cast(Any, None), "50ms", "ask")
