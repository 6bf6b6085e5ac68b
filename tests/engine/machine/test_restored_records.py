"""A machine is restored only from blocks that have the records of its vCPUs, where kernels look for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import InvalidValue
from engine.machine import VirtualMachine
from engine.state.config import HostConfig
from tests.engine.builders import PROFILES, assert_sound, machine, protect

Blocks = dict[tuple[str, int], bytes]


def parts(vm: VirtualMachine) -> tuple[dict[str, Any], Blocks]:
    return json.loads(vm.head_json()), {(array, block): data for array, block, data in vm.changed_blocks()}


def three_of_eight(profile: str) -> VirtualMachine:
    """Records in the frames 1 to 3, places of vCPUs in 4 to 8."""
    vm = machine(profile, vcpus=range(3), vcpu_room=8, host=HostConfig(nested=False))
    protect(vm, "text", (0x3000, 256))
    return vm


def without(head: dict[str, Any], blocks: Blocks, *records: int) -> None:
    for record in records:
        del blocks["vcpu", record]


def moved(head: dict[str, Any], blocks: Blocks, record: int, to: int) -> None:
    blocks["vcpu", to] = blocks.pop(("vcpu", record))


def in_a_place(head: dict[str, Any], blocks: Blocks, place: int) -> None:
    blocks["memory", place] = bytes(4096)


def of_frames(head: dict[str, Any], blocks: Blocks, total: int) -> None:
    head["frames"] = total
    for array, block in list(blocks):
        if block >= total:
            del blocks[array, block]


@pytest.mark.parametrize(
    ("damage", "numbers", "field", "value"),
    [
        (without, (3,), "blocks", 2),
        (without, (1, 2, 3), "blocks", 0),
        (moved, (3, 4), "blocks", [1, 2, 4]),
        (moved, (1, 4), "blocks", [2, 3, 4]),
        (moved, (2, 10_000), "blocks", [1, 3, 10_000]),
        (in_a_place, (4,), "blocks", 4),
        (in_a_place, (8,), "blocks", 8),
        (of_frames, (8,), "frames", 8),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_records_that_are_not_those_of_the_machine(
    profile: str, damage: Callable[..., None], numbers: tuple[int, ...], field: str, value: object
) -> None:
    head, blocks = parts(three_of_eight(profile))
    damage(head, blocks, *numbers)
    with pytest.raises(InvalidValue) as caught:
        VirtualMachine.restore(head, blocks)
    assert (caught.value.field, caught.value.value) == (field, value)


def test_the_first_record_is_always_there() -> None:
    head, blocks = parts(machine("kvm-2019", vcpus=(), vcpu_room=2, spp=False))
    without(head, blocks, 1)
    with pytest.raises(InvalidValue, match="1 records of vCPUs or more"):
        VirtualMachine.restore(head, blocks)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_whole_is_restored(profile: str) -> None:
    head, blocks = parts(three_of_eight(profile))
    assert_sound(VirtualMachine.restore(head, blocks | {("free", 5): bytes(4096)}))
