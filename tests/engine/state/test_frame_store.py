"""Published states and changes on top of them: copy-on-write, recycled rows, giving up, and the durable form."""

from __future__ import annotations

import gc
import json
import weakref
from random import Random
from typing import Any

import numpy as np
import pytest

from engine.cpu import frames
from engine.errors import Busy, InvalidValue, LimitExceeded
from engine.kvm import page_contents
from engine.kvm.protections import ProtectedObject, ProtectedPages
from engine.kvm.slots import SlotSpec, slot_table
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.state.frame_store import Draft, blocks_of
from engine.state.head import config_from_head, config_to_head
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from tests.engine.builders import (
    MIB,
    PROFILES,
    Durable,
    assert_sound,
    bare_draft,
    chunk,
    machine,
    maps,
    picture,
    protect,
    replay,
    round_trip,
    set_map,
    unchanged,
)

# ---- snapshots


def test_state_that_a_reader_holds_never_changes() -> None:
    vm = machine()
    set_map(vm, 1, 0x11)
    vm.write_memory(0x1000, b"then")
    held = vm.state.current
    then = picture(vm)[1]
    for word in range(20):
        set_map(vm, 1, word)
        vm.write_memory(0x1000, bytes([word]) * 4)
        vm.access(AccessRequest(0x1000, on_violation="grant"))
    blocks = {frame: data for frame, _, data in blocks_of(held.snapshot.machine, None)}
    assert blocks == {frame: data for frame, (_, data) in then.items()}
    assert page_contents.read_bytes(held.snapshot.machine, 0x1000, 4) == b"then"
    assert vm.read_memory(0x1000, 4) == b"\x13" * 4
    assert_sound(vm)


def test_state_that_a_reader_holds_survives_a_change_that_is_given_up() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)])
    vm.write_memory(0x1000, b"then")
    held = vm.state.current
    with unchanged(vm), vm.replay(ReplayOptions()) as run:
        run.feed(chunk([i << 30 for i in range(900)]))
    for word in range(6):
        vm.write_memory(0x1000, bytes([word]) * 4)
    assert page_contents.read_bytes(held.snapshot.machine, 0x1000, 4) == b"then"
    assert_sound(vm)


def test_many_changes_use_the_same_rows_again() -> None:
    vm = machine()
    set_map(vm, 1, 1)
    vm.access(AccessRequest(0x1000))
    gc.collect()
    rows = vm.state.current.snapshot.machine.rows.shape[0]
    for word in range(300):
        set_map(vm, 1, word & 1)
    assert vm.state.current.snapshot.machine.rows.shape[0] == rows
    assert len(vm.state.store._retired) <= 2
    assert_sound(vm)


def test_rows_of_a_held_state_wait_and_then_come_back() -> None:
    vm = machine()
    set_map(vm, 1, 0)
    held = vm.state.current
    for word in range(50):
        set_map(vm, 1, word)
    waiting = len(vm.state.store._retired)
    assert waiting == 50
    del held
    set_map(vm, 1, 99)
    assert len(vm.state.store._retired) <= 2
    assert_sound(vm)


def test_slots_that_come_and_go_do_not_grow_the_machine() -> None:
    vm = machine(slots=[])
    sizes = []
    for _ in range(12):
        vm.set_slot(SlotSpec(0, 0, MIB))
        vm.write_memory(0, bytes(64 * 4096 - 1) + b"x")
        vm.access(AccessRequest(0x1000))
        vm.delete_slot(0)
        sizes.append(vm.counters()["memory_bytes"])
    assert len(set(sizes)) == 1
    assert_sound(vm)


def test_change_that_publishes_nothing_new_costs_no_row() -> None:
    vm = machine()
    set_map(vm, 1, 5)
    before = vm.state.current.snapshot.machine.row_of.copy()
    set_map(vm, 1, 5)
    assert np.array_equal(vm.state.current.snapshot.machine.row_of[: len(before)], before)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_change_that_fails_is_forgotten(error: type[BaseException]) -> None:
    vm = machine()
    set_map(vm, 1, 5)

    def fail() -> None:
        with vm.state.change() as draft:
            frames.write_word(draft.machine, frames.STATE_FRAME, 100, 1)
            frames.new_frame(draft.machine, frames.CLIENT)
            raise error

    with unchanged(vm), pytest.raises(error):
        fail()


def test_draft_grows_frames_and_rows_and_keeps_what_it_has() -> None:
    vm = machine()
    store = vm.state.store
    draft = store.begin(slot_table(vm.slots()))
    taken = [int(frames.new_frame(draft.machine, frames.CLIENT)) for _ in range(100)]
    for value, frame in enumerate(taken):
        frames.write_word(draft.machine, frame, 0, value)
    draft.ensure(2000)
    m = draft.machine
    assert m.top[frames.TOP_FREE] >= 2000 and m.top[frames.TOP_SPARE] >= 2000
    assert [int(frames.read_word(m, frame, 0)) for frame in taken] == list(range(100))
    assert set(draft.changed()) == set(taken)
    assert len(draft.taken_rows()) >= 100 and not np.intersect1d(draft.spare_rows(), draft.taken_rows()).size
    more = [int(frames.new_frame(m, frames.CLIENT)) for _ in range(500)]
    assert not set(more) & set(taken)
    store.publish(draft)
    assert isinstance(draft, Draft)
    published = store.published.machine
    assert [int(frames.read_word(published, frame, 0)) for frame in taken] == list(range(100))


# ---- the durable form


def rich(profile: str) -> VirtualMachine:
    vm = machine(
        profile,
        slots=[SlotSpec(0, 0, 4 * MIB), SlotSpec(7, 1 << 40, MIB, read_only=True, host_page_size=2 * MIB)],
        vcpus=(0, 3),
        name="rich",
    )
    set_map(vm, 1, 0xF0)
    vm.protect("p", [ProtectedObject("a", 0x2010, 8), ProtectedObject("b", 0x3000, 0x2000)])
    vm.protect(
        "q",
        [ProtectedObject("c", 0x6010, 8, "page", 0xFFFF << 48, "why")],
        [ProtectedPages(7, 2, 0xFFFFFFFE)],
        "a note",
    )
    vm.write_memory(0x1FFE, b"durable")
    replay(vm, [0x1000, 0x2000, (0x3000, 8, 1, 3), 0x9000, 1 << 42], on_violation="grant")
    return vm


@pytest.mark.parametrize("profile", PROFILES)
def test_machine_comes_back_from_its_head_and_blocks(profile: str) -> None:
    vm = rich(profile)
    back = round_trip(vm)
    assert back.config == vm.config
    assert back.slots() == vm.slots() and back.protections() == vm.protections()
    assert back.counters() == vm.counters()
    for layer in ("effective", "set", "protected", "granted"):
        assert maps(back, 0, 16, layer) == maps(vm, 0, 16, layer)
    assert back.read_memory(0x1FFE, 7) == b"durable"
    assert back.walk(0x2000).outcome == vm.walk(0x2000).outcome
    rows = [0x1080, 0x2010, 0x3000, 0xA000]
    assert replay(back, rows).violations == replay(vm, rows).violations == 1
    assert picture(back)[1] == picture(vm)[1]


def test_a_head_from_before_there_were_pages_and_notes() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("a", 0x2010, 8)])
    head = vm.head()
    assert head["protections"] == [{"name": "p", "objects": [["a", 0x2010, 8]]}]
    assert round_trip(vm).protections() == vm.protections()


def test_increments_on_top_of_earlier_ones_give_the_same_machine() -> None:
    vm = machine()
    disk = Durable()
    assert disk.save(vm) == len(picture(vm)[1]), "the first call gives everything"
    assert disk.save(vm) == 0
    steps: list[Any] = [
        lambda: set_map(vm, 1, 0),
        lambda: vm.write_memory(0x1000, b"one"),
        lambda: replay(vm, [0x1000, 0x2000]),
        lambda: protect(vm, "p", (0x2000, 1)),
        lambda: vm.delete_slot(0),
        lambda: vm.set_slot(SlotSpec(4, 0, MIB)),
        lambda: vm.write_memory(0x8000, b"in frames of the old slot"),
        lambda: vm.unprotect("p"),
        lambda: vm.set_slot(SlotSpec(4, 32 * MIB, MIB)),
    ]
    for step in steps:
        step()
        known = set(disk.blocks)
        changed = disk.save(vm)
        assert changed < len(known | set(disk.blocks)) or step is steps[0]
        assert disk.blocks == picture(vm)[1]
        back = disk.restore()
        assert (back.slots(), back.protections()) == (vm.slots(), vm.protections())
        assert_sound(back)


def test_increment_has_only_the_blocks_that_changed() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    for page in range(64):
        vm.write_memory(page << 12, b"x")
    disk = Durable()
    disk.save(vm)
    vm.write_memory(5 << 12, b"y")
    changed = list(vm.changed_blocks())
    assert [(array, data[:1]) for array, _, data in changed] == [("memory", b"y")]
    vm.write_memory(5 << 12, b"y")
    assert len(list(vm.changed_blocks())) <= 1


def test_freed_blocks_are_named() -> None:
    vm = machine()
    vm.write_memory(0x1000, b"x")
    disk = Durable()
    disk.save(vm)
    gone = {block for block, (array, _) in disk.blocks.items() if array in ("memory", "layer")}
    vm.delete_slot(0)
    freed = {block: data for array, block, data in vm.changed_blocks() if array == "free"}
    assert set(freed) == gone and set(freed.values()) == {bytes(4096)}


@pytest.mark.parametrize("changes", range(1, 5))
def test_increment_after_a_change_that_was_given_up(changes: int) -> None:
    """Rows must not come round to where they were before while an increment is still to be compared with them."""
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)])
    vm.write_memory(0x1000, b"old")
    disk = Durable()
    disk.save(vm)
    with vm.replay(ReplayOptions()) as run:
        run.feed(chunk([i << 30 for i in range(900)]))
    for word in range(changes):
        vm.write_memory(0x1000, b"new%d" % word)
    disk.save(vm)
    assert disk.restore().read_memory(0x1000, 4) == b"new%d" % (changes - 1)
    assert disk.blocks == picture(vm)[1]


def test_restored_machine_gives_everything_once_more() -> None:
    vm = machine()
    disk = Durable()
    disk.save(vm)
    back = disk.restore()
    again = Durable()
    assert again.save(back) == len(disk.blocks)
    assert again.blocks == disk.blocks


def test_other_format_is_refused() -> None:
    vm = machine()
    head = {**vm.head(), "format": 99}
    with pytest.raises(InvalidValue, match="this release reads formats up to 2") as caught:
        VirtualMachine.restore(head, {})
    assert (caught.value.field, caught.value.value) == ("format", 99)


CONFIGS = [
    VmConfig(),
    VmConfig(
        name="näme",
        profile="kvm-latest",
        vcpus=(VcpuConfig(4, 7, (1, 2)), VcpuConfig(0)),
        maxphyaddr=52,
        translation_cache="model",
        host=HostConfig(
            vendor="amd",
            ept=False,
            spp=False,
            nested=True,
            evmcs=True,
            vmx_capabilities={"ept_vpid_cap": (1 << 64) - 1},
            hyperv={"leaves": [1, 2]},
            fail_allocation=3,
        ),
        require_match=True,
        max_table_frames=99,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "everything else"])
def test_configuration_survives_json(config: VmConfig) -> None:
    assert config_from_head(json.loads(json.dumps(config_to_head(config)))) == config
    config.validate()


def test_machine_with_the_model_switch_uses_no_fast_path_and_counts_the_same() -> None:
    rows = [0x1000, 0x1000, 0x1200, (0x1000, 8, 0), 0x2000]
    results = []
    for cache in ("off", "model"):
        vm = machine(translation_cache=cache)
        set_map(vm, 1, 0xF)
        results.append(replay(vm, rows * 20))
    assert results[0].exits == results[1].exits
    assert results[0].violations == results[1].violations == 20


def test_change_is_beyond_the_limit_by_one_access_at_most() -> None:
    vm = machine(max_table_frames=5000)
    draft = vm.state.open()

    def fill() -> None:
        while True:
            draft.ensure()
            while frames.ample(draft.machine):
                frames.new_frame(draft.machine, frames.CLIENT)

    with pytest.raises(LimitExceeded):
        fill()
    have, reserve = len(draft.machine.row_of), int(draft.machine.caps[frames.CAP_RESERVE])
    assert have <= 5000 + reserve
    assert have - int(draft.machine.top[frames.TOP_FREE]) == 5001
    vm.state.abandon(draft)
    assert vm.frames_in_use < 10


# ---- successors: a change that is shown only when it is kept


def test_a_successor_takes_the_changes_and_its_predecessor_shows_none() -> None:
    vm = machine()
    set_map(vm, 1, 0x11)
    before = picture(vm)
    after = vm.successor()
    set_map(after, 1, 0x22)
    after.write_memory(0x1000, b"now")
    assert picture(vm) == before and maps(vm, 1) == [0x11]
    assert maps(after, 1) == [0x22] and after.read_memory(0x1000, 3) == b"now"
    with pytest.raises(Busy):
        set_map(vm, 1, 0x33)
    assert_sound(after)


def test_a_withdrawn_successor_leaves_no_trace() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    set_map(vm, 1, 0x11)
    before = picture(vm)
    for turn in range(20):
        after = vm.successor()
        for word in range(3):
            set_map(after, 1, 0x100 * turn + word)
            after.write_memory(0x1000 * (turn + word + 1), b"gone")
        protect(after, f"p{turn}", (0x4000, 256))
        after.delete_slot(0)
        vm.withdraw(after)
        assert picture(vm) == before
        with pytest.raises(Busy):
            after.set_slot(SlotSpec(7, 1 << 40, MIB))
        assert_sound(vm)
        set_map(vm, 2, turn)
        before = picture(vm)
    gc.collect()
    rows = len(vm.state.current.snapshot.machine.rows)
    for turn in range(300):
        after = vm.successor()
        set_map(after, 1, turn)
        vm.withdraw(after)
        set_map(vm, 2, turn & 1)
        del after
    assert len(vm.state.current.snapshot.machine.rows) == rows, "rows of withdrawn states are used again"


def test_a_state_held_from_before_survives_a_withdrawal() -> None:
    vm = machine()
    set_map(vm, 1, 0x11)
    first = vm.successor()
    first.write_memory(0x1000, b"never")
    vm.withdraw(first)
    vm.write_memory(0x1000, b"then")
    held = vm.state.current
    vm.write_memory(0x1000, b"here")
    after = vm.successor()
    after.write_memory(0x1000, b"gone")
    late = after.state.current
    vm.withdraw(after)
    later = []
    for word in range(60):
        set_map(vm, 1, word)
        vm.write_memory(0x1000, bytes([word]) * 4)
        later.append(vm.state.current)  # so that no row comes back, and every spare one is taken
    assert page_contents.read_bytes(held.snapshot.machine, 0x1000, 4) == b"then"
    assert page_contents.read_bytes(late.snapshot.machine, 0x1000, 4) == b"gone"
    assert [page_contents.read_bytes(state.snapshot.machine, 0x1000, 1)[0] for state in later] == list(range(60))


def test_a_successor_that_grew_is_withdrawn() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 44)])
    vm.write_memory(0x1000, b"then")
    before = picture(vm)
    after = vm.successor()
    replay(after, [i << 30 for i in range(900)])
    assert len(after.state.current.snapshot.machine.rows) > len(vm.state.current.snapshot.machine.rows)
    vm.withdraw(after)
    assert picture(vm) == before
    vm.write_memory(0x1000, b"next")
    assert vm.read_memory(0x1000, 4) == b"next"
    assert_sound(vm)


@pytest.mark.parametrize("seed", range(4))
def test_a_line_of_successors_some_of_which_are_refused(seed: int) -> None:
    """Changes that share a transaction: each goes on from the last that was kept, and all go when it fails."""
    random = Random(seed)
    vm = machine()
    for _ in range(12):
        before, tip, wanted = picture(vm), vm, None
        for _ in range(random.randrange(1, 12)):
            after = tip.successor()
            for _ in range(random.randrange(3)):
                set_map(after, random.randrange(8), random.getrandbits(32))
                after.write_memory(random.randrange(8) << 12, random.randbytes(8))
            if random.random() < 0.3:
                shown = picture(tip)
                tip.withdraw(after)
                assert picture(tip) == shown
            else:
                tip = after
            wanted = picture(tip)
            assert picture(vm) == before
        if tip is not vm and random.random() < 0.4:
            vm.withdraw(tip)
            assert picture(vm) == before
        else:
            vm = tip
            assert picture(vm) == wanted
        assert_sound(vm)
        round_trip(vm)


def test_growth_is_near_where_rows_would_be_copied() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 40)])
    assert not vm.growth_is_near, "few rows are copied at once"
    replay(vm, [i << 30 for i in range(900)])
    line, growths = [vm], 0
    while not line[-1].growth_is_near:
        line.append(line[-1].successor())
        set_map(line[-1], len(line), 0)
        growths += line[-1].state.current.snapshot.machine.rows is not line[-2].state.current.snapshot.machine.rows
    assert len(line) > 10 and not growths
    assert len(line[-1].state.current.snapshot.machine.rows) > 1024


def test_blocks_since_a_predecessor_give_the_successor() -> None:
    vm = machine(slots=[SlotSpec(0, 0, 1 << 30)])
    stored = {block: (kind, data) for kind, block, data in vm.blocks_since(None)}
    for word in range(5):
        after = vm.successor()
        set_map(after, word, word)
        after.write_memory(word << 12, b"x")
        changed = list(after.blocks_since(vm))
        assert changed == list(after.blocks_since(vm)), "asking does not change the answer"
        stored.update({block: (kind, data) for kind, block, data in changed})
        vm = after
    copied = VirtualMachine.restore(
        json.loads(json.dumps(vm.head())),
        {(kind, block): data for block, (kind, data) in stored.items() if kind != "free"},
    )
    assert picture(copied) == picture(vm)


def test_a_draft_that_is_given_up_holds_no_memory() -> None:
    """The traceback of a refusal may live until the garbage collector comes by, with all that its frames name."""
    draft = bare_draft()
    draft.ensure(5000)
    grown = weakref.ref(draft.machine.rows)
    draft.store.abandon(draft)
    assert grown() is None
