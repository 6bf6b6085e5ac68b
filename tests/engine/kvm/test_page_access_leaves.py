"""Page access seen from inside: leaves, and the pairing with the write bitmap."""

from __future__ import annotations

import pytest

from engine.arch import ept as bits
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.page_access import AccessChange, text_of
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PAGE,
    PROFILES,
    READ,
    WRITE,
    leaf,
    machine,
    maps,
    replay,
    resolutions,
    round_trip,
    set_map,
    unchanged,
)

R, W, X = bits.READ, bits.WRITE, bits.EXECUTE


def have(vm: VirtualMachine, gfn: int) -> tuple[str, int]:
    (page,) = vm.page_access.read([gfn])
    return text_of(page.rights), page.bitmap


@pytest.mark.parametrize("profile", PROFILES)
def test_rights_of_a_leaf(profile: str) -> None:
    vm = machine(profile)
    replay(vm, [2 * PAGE])
    vm.page_access.set([AccessChange(2, rights=R)])
    assert leaf(vm, 2) is None
    result = replay(vm, [(2 * PAGE, 8, READ), (2 * PAGE, 8, EXECUTE), 2 * PAGE])
    assert result.violations == result.page_granular_violations == 2
    assert leaf(vm, 2) & bits.RIGHTS == R
    vm.page_access.set([AccessChange(2, rights=X, bitmap=FULL >> 1)])
    assert replay(vm, [(2 * PAGE, 8, EXECUTE), (2 * PAGE, 8, READ), 2 * PAGE]).violations == 2
    assert leaf(vm, 2) & (bits.RIGHTS | bits.SPP) == X
    vm.page_access.set([AccessChange(2, rights=0)])
    assert replay(vm, [(2 * PAGE, 8, access) for access in (READ, WRITE, EXECUTE)]).violations == 3
    assert leaf(vm, 2) is None


def test_a_right_that_is_given_back_is_had_at_once() -> None:
    vm = machine()
    vm.page_access.set([AccessChange(2, rights=0)])
    vm.page_access.set([AccessChange(2, rights=R | W | X)])
    assert replay(vm, [(2 * PAGE, 8, access) for access in (READ, WRITE, EXECUTE)]).violations == 0
    assert maps(vm, 2) == [FULL]
    assert vm.counters()["frames_layer"] == 0


def test_write_access_is_the_set_map() -> None:
    vm = machine()
    set_map(vm, 2, 0xF0)
    assert have(vm, 2) == ("r-x", 0xF0)
    vm.page_access.set([AccessChange(2, rights=R | X)])
    assert have(vm, 2) == ("r-x", 0xF0)
    vm.page_access.set([AccessChange(2, rights=R | W)])
    assert have(vm, 2) == ("rw-", FULL) and maps(vm, 2, layer="set") == [FULL]
    vm.page_access.set([AccessChange(2, rights=R)])
    assert have(vm, 2) == ("r--", 0)


def test_no_grant_opens_a_page_without_read() -> None:
    vm = machine()
    vm.page_access.set([AccessChange(2, rights=X)])
    result = replay(vm, [2 * PAGE], on_violation="grant")
    assert result.violations == 1 and vm.counters()["grants"] == 0
    assert maps(vm, 2) == [0]
    # A read that is refused opens nothing for writes.
    assert replay(vm, [(2 * PAGE, 8, READ)], on_violation="grant").violations == 1
    assert maps(vm, 2) == [0]


@pytest.mark.parametrize("mode", ["apply-all", "stop-at-first"])
def test_modes_that_go_on(mode: str) -> None:
    vm = machine()
    batch = [AccessChange(2, rights=R), AccessChange(1 << 20, rights=R), AccessChange(3, bitmap=1)]
    outcomes = [result.outcome for result in vm.page_access.set(batch, mode)]
    assert outcomes == ["applied", "refused", "applied" if mode == "apply-all" else "not-tried"]
    assert have(vm, 2) == ("r--", 0)
    assert have(vm, 3) == (("r-x", 1) if mode == "apply-all" else ("rwx", FULL))


def test_an_atomic_batch_changes_nothing_when_one_is_refused() -> None:
    vm = machine()
    with unchanged(vm), pytest.raises(Exception, match="memory slot") as caught:
        vm.page_access.set([AccessChange(2, rights=R), AccessChange(1 << 20, rights=R)])
    assert caught.value.field == "entries[1].gfn"  # type: ignore[attr-defined]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_restricted_page_is_mapped_small_and_comes_back_from_disk(profile: str) -> None:
    vm = machine(profile, slots=[SlotSpec(0, 0, 4 * MIB, host_page_size=2 * MIB)])
    replay(vm, [3 * PAGE])
    vm.page_access.set([AccessChange(2, rights=R | W)])
    for each in (vm, round_trip(vm)):
        assert resolutions(replay(each, [(2 * PAGE, 8, EXECUTE)])) == ["violation"]
        assert replay(each, [(3 * PAGE, 8, EXECUTE), 3 * PAGE]).violations == 0
        assert not leaf(each, 3) & bits.PAGE
