"""Random guests that give pages away and flush, held against what a guest has to do.

A guest that flushes every processor which has used a page since its last change never goes stale, in no policy and
under no execution. Without one flush that was needed, the access that needed it is told, with the flush it lacked.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arch import hypercall as hv
from engine.machine import VirtualMachine
from tests.engine.hyperv.flush_traces import Row, access, call, flush, invlpg, mov_cr3, replayed, sparse
from tests.engine.hyperv.guests import hyperv_guest

VPS = (0, 5, 65)  # of vCPUs 0, 1 and 2
PAGES = (0x7F0000001000, 0x7F0000002000, 0xFFFF800000001000)
SPACES = (0x100000, 0x200000)
FRAMES = (0x11000, 0x12000, 0x13000)
WAYS = ("list", "space", "everything", "sparse", "fast", "local")

Key = tuple[int, int, int]  # vCPU, address space, page


class Guest:
    """A guest that keeps to the rules: what it maps where, which vCPU uses what, and the trace of all that."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tables: dict[tuple[int, int], int] = {}
        self.used: set[Key] = set()
        # For each flush: the translations it was for, and its rows.
        self.flushes: list[tuple[set[Key], range]] = []

    def use(self, vcpu: int, space: int, page: int) -> None:
        frame = self.tables.setdefault((space, page), FRAMES[0])
        self.used.add((vcpu, space, page))
        self.rows.append(access(vcpu, frame, page, address_space=space))

    def move(self, space: int, page: int, frame: int, way: str) -> None:
        """Give a page another frame, and flush whoever has used it."""
        if self.tables.get((space, page)) == frame:
            return
        self.tables[space, page] = frame
        needed = {key for key in self.used if key[1:] == (space, page)}
        first = len(self.rows)
        for vcpu in sorted({key[0] for key in needed}) if needed else ():
            self.rows += _flush(way, vcpu, space, page)
        if needed:
            self.flushes.append((needed, range(first, len(self.rows))))
        self.used -= needed


def _flush(way: str, vcpu: int, space: int, page: int) -> list[Row]:
    """A flush of one processor, sent by another."""
    sender, vp = (vcpu + 1) % 3, VPS[vcpu]
    if way == "local":
        return [{**invlpg(vcpu, page), "address_space": space}]
    if way == "sparse" or vp > 63:
        return [call(hv.LIST_EX, sender, address_space=space, vp_set=sparse(vp), ranges=(page,))]
    if way == "list":
        return [flush(vp, vcpu=sender, space=space, pages=[page])]
    if way == "fast":
        return [flush(vp, vcpu=sender, space=space, pages=[page], fast=True)]
    every = hv.ALL_SPACES if way == "everything" else 0
    return [call(hv.SPACE, sender, flags=every, address_space=space, processor_mask=1 << vp)]


STEPS = st.one_of(
    st.tuples(st.just("use"), st.integers(0, 2), st.sampled_from(SPACES), st.sampled_from(PAGES)),
    st.tuples(
        st.just("move"),
        st.sampled_from(SPACES),
        st.sampled_from(PAGES),
        st.sampled_from(FRAMES),
        st.sampled_from(WAYS),
    ),
    st.tuples(st.just("switch"), st.integers(0, 2), st.sampled_from(SPACES)),
)


def trace(steps: list[tuple[Any, ...]]) -> Guest:
    guest = Guest()
    for kind, *values in steps:
        if kind == "use":
            guest.use(*values)
        elif kind == "move":
            guest.move(*values)
        else:
            guest.rows.append(mov_cr3(*values))
    return guest


def machine(policy: str, execution: str | None = None) -> VirtualMachine:
    return hyperv_guest(VPS, flush_policy=policy, flush_execution=execution)


@pytest.mark.parametrize(
    ("policy", "execution"), [("tlfs", "exact"), ("tlfs", "kvm"), ("kvm", "kvm"), ("kvm", "exact")]
)
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEPS, min_size=4, max_size=25), split=st.integers(0, 3))
def test_a_guest_that_flushes_is_never_stale(policy: str, execution: str, steps: Any, split: int) -> None:
    guest = trace(steps)
    found = replayed(machine(policy, execution), guest.rows, split=split).translations if guest.rows else None
    assert found is None or (found.stale == 0 and found.stale_records == ())


def _lost(guest: Guest, at: int) -> tuple[list[Row], dict[Key, int]]:
    """The trace without one flush, and the first access by each translation that it leaves behind.

    Only what is sure: translations that nothing else of the trace could have removed.
    """
    needed, gone = guest.flushes[at]
    rows = guest.rows[: gone.start] + guest.rows[gone.stop :]
    victims: dict[Key, int] = {}
    dropped: set[Key] = set()
    for index, row in enumerate(rows[gone.start :], gone.start):
        if row.get("op"):
            # A load of CR3 removes everything of its vCPU; other flushes what they are about, or more.
            dropped |= {key for key in needed if row["op"] == 1 or row["vcpu"] == key[0]}
            continue
        key = row["vcpu"], row["address_space"], row["gva"]
        if key in needed - dropped and key not in victims:
            victims[key] = index
            if row["gpa"] == _frame_before(guest, gone.start, key):
                del victims[key]
                dropped.add(key)
    return rows, victims


def _frame_before(guest: Guest, end: int, key: Key) -> int | None:
    """The frame that a translation has, made before a position of the trace."""
    for row in reversed(guest.rows[:end]):
        if not row.get("op") and (row["vcpu"], row["address_space"], row["gva"]) == key:
            frame: int = row["gpa"]
            return frame
    return None


def _survives(guest: Guest, key: Key, end: int) -> bool:
    """Whether nothing between the last use of a translation and a position can have removed it."""
    for row in reversed(guest.rows[:end]):
        if row.get("op"):
            if row["op"] == 1 or row["vcpu"] == key[0]:
                return False
        elif (row["vcpu"], row["address_space"], row["gva"]) == key:
            return True
    return False


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEPS, min_size=4, max_size=25), data=st.data())
def test_a_flush_that_is_lost_is_told(steps: Any, data: st.DataObject) -> None:
    guest = trace([*[("use", vcpu, SPACES[0], PAGES[0]) for vcpu in range(3)], *steps])
    for vcpu in range(3):  # so that the last move has somebody to flush
        guest.use(vcpu, SPACES[0], PAGES[0])
    last = guest.tables[SPACES[0], PAGES[0]]
    guest.move(SPACES[0], PAGES[0], next(frame for frame in FRAMES if frame != last), data.draw(st.sampled_from(WAYS)))
    for vcpu in range(3):
        guest.use(vcpu, SPACES[0], PAGES[0])
    at = data.draw(st.integers(0, len(guest.flushes) - 1))
    rows, victims = _lost(guest, at)
    sure = {key: i for key, i in victims.items() if _survives(guest, key, guest.flushes[at][1].start)}
    assert len(sure) == 3 or any(row.get("op") for row in rows), "without other operations all of them are"
    found = replayed(machine("tlfs"), rows).translations
    told = {(item.vcpu, item.address_space, item.gva): item for item in reversed(found.stale_records)}
    for key, index in sure.items():
        item = told[key]
        assert item.index == index and item.vp_index == VPS[key[0]]
        assert item.changed_after is not None and item.changed_after < guest.flushes[at][1].start <= item.index
        assert f"VP {item.vp_index} needed a flush of {item.gva:#x}" in item.explanation
    assert set(told) <= guest.flushes[at][0], "nothing else is stale"
