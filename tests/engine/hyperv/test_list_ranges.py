"""What the entries of a flush list cover at the ends of linear addresses, by the specification and as KVM reads them.

TLFS: GVAs beyond the partition's GVA space are ignored, addresses and not ranges. KVM: Linux 6.16 looks at the first
address of an entry (fa787ac07b3c), 7.1 at each page (a5264387c2ee); pages follow each other modulo 2^64 in both.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from numpy import int64
from numpy.typing import NDArray

from engine.arch.words import unsigned
from engine.cpu import tlb
from engine.hyperv import flush_execution, flush_ranges
from engine.hyperv.flush_execution import Effect
from engine.hyperv.flush_ranges import KvmLists
from engine.state.profiles import KVM_2019, KVM_LATEST, PROFILES

from .flush_machine import FlushMachine, words

PLACES = {
    "zero": 0,
    "ffd": 0xFFD000,
    "ffe": 0xFFE000,
    "low": 0x0000_7FFF_FFFF_F000,  # the last page below the addresses that 48 bits cannot reach
    "past low": 0x0000_8000_0000_0000,
    "before high": 0xFFFF_7FFF_FFFF_F000,
    "high": 0xFFFF_8000_0000_0000,  # the first page above them
    "high+1": 0xFFFF_8000_0000_1000,
    "top": 0xFFFF_FFFF_FFFF_F000,
}
NAMES = {linear: name for name, linear in PLACES.items()}


class Row(NamedTuple):
    """One entry of a list: what the specification requires, what each KVM flushes and by how much it counts."""

    entry: int
    width: int
    required: set[str]
    in_2019: set[str]
    counts_2019: int
    latest: set[str]
    counts_latest: int = 1


ACROSS = {"before high", "high"}
ROWS = (
    Row(0xFFFF_7FFF_FFFF_F001, 48, {"high"}, set(), 0, {"high"}),
    Row(0xFFFF_7FFF_FFFF_F001, 57, ACROSS, ACROSS, 1, ACROSS),
    Row(0xFFFF_7FFF_FFFF_E000 | 0xFFF, 48, {"high", "high+1"}, set(), 0, {"high", "high+1"}),
    Row(0x0000_7FFF_FFFF_F001, 48, {"low"}, {"low"}, 1, {"low"}),
    Row(0x0000_7FFF_FFFF_F001, 57, {"low", "past low"}, {"low", "past low"}, 1, {"low", "past low"}),
    Row(0xAAAA_AAAA_AAAA_AFFF, 48, set(), set(), 0, set()),
    Row(0xAAAA_AAAA_AAAA_AFFF, 57, set(), set(), 0, set()),
    Row(0xFFFF_FFFF_FFFF_FFFE, 48, {"top"}, {"top", "zero", "ffd"}, 1, {"top", "zero", "ffd"}),
    Row(0xFFFF_FFFF_FFFF_FFFE, 57, {"top"}, {"top", "zero", "ffd"}, 1, {"top", "zero", "ffd"}),
    Row(0xFFFF_FFFF_FFFF_F001, 48, {"top"}, {"top", "zero"}, 1, {"top", "zero"}),
    Row(0xFFFF_FFFF_FFFF_F000, 48, {"top"}, {"top"}, 1, {"top"}),
)
IDS = [f"{row.entry:#x}-{row.width}" for row in ROWS]
by_row = pytest.mark.parametrize("row", ROWS, ids=IDS)
by_profile = pytest.mark.parametrize("profile", PROFILES)


def machine(policy: str, way: str | None, profile: str, width: int) -> FlushMachine:
    """A machine of which VP 0 remembers the places, whether its host can have them or not."""
    made = FlushMachine(policy, way, profile=profile, width=width)
    for linear in PLACES.values():
        made.fill(0, 0x3000, linear, 12, False)
    return made


def call(made: FlushMachine, *entries: int) -> Effect:
    """A list for VP 0 alone, in the address space of the places."""
    done = made.slow(len(entries) << 32 | 3, words(0x3000, 0, 1, *entries))
    assert done.result == len(entries) << 32 and done.targeted == (0,)
    return next(effect for effect in done.effects if effect.vp.vp_index == 0)


def names(rows: NDArray[int64]) -> set[str]:
    linear = (unsigned(int(row[tlb.E_PAGE])) << 12 & (1 << 64) - 1 for row in rows)
    return {NAMES[at] for at in linear if at in NAMES}


@by_profile
@by_row
def test_by_the_specification(row: Row, profile: str) -> None:
    for way in ("exact", "kvm", "paranoid"):
        effect = call(machine("tlfs", way, profile, row.width), row.entry)
        assert names(effect.required) == row.required
        assert not len(effect.left)
        if way == "exact":
            assert names(effect.dropped) == row.required and not len(effect.over_flushed)


@by_profile
@by_row
def test_as_kvm_reads_it(row: Row, profile: str) -> None:
    gone, counts = (row.in_2019, row.counts_2019) if profile == KVM_2019 else (row.latest, row.counts_latest)
    effect = call(machine("kvm", None, profile, row.width), row.entry)
    assert (names(effect.dropped), effect.flushes) == (gone, counts)
    assert (names(effect.required), names(effect.left)) == (row.required, row.required - gone)
    assert names(effect.over_flushed) == gone - row.required
    narrowed = call(machine("kvm", "exact", profile, row.width), row.entry)
    assert names(narrowed.dropped) == gone & row.required
    assert names(narrowed.left) == row.required - gone


@pytest.mark.parametrize(("profile", "left", "counts"), [(KVM_2019, {"high"}, 1), (KVM_LATEST, set(), 2)])
def test_what_a_sleeping_vp_does_later_is_the_same(profile: str, left: set[str], counts: int) -> None:
    made = machine("kvm", None, profile, 48)
    made.run_elsewhere(0)
    effect = call(made, 0xFFFF_7FFF_FFFF_F001, 0x0000_7FFF_FFFF_F000)
    assert effect.queued and names(effect.left) == {"high", "low"}
    assert flush_execution.service(made.m, 0, False, made.context.facts) == counts
    rows = made.m.tlb[(made.m.tlb[:, tlb.E_GENERATION] == made.m.tlb[0, tlb.GENERATION])][1:]
    assert names(rows) & {"high", "low"} == left


@by_profile
def test_all_ones_stays_everything_to_kvm(profile: str) -> None:
    made = machine("kvm", None, profile, 48)
    effect = call(made, (1 << 64) - 1)
    assert names(effect.dropped) == set(PLACES) and names(effect.required) == {"top"}
    assert made.held(0) == "" and effect.flushes == 1
    strict = call(machine("tlfs", None, profile, 48), (1 << 64) - 1)
    assert names(strict.dropped) == {"top"} and not len(strict.over_flushed)


def test_rows_are_runs_of_canonical_pages() -> None:
    edge = 1 << 35  # pages of each half of 48 bits
    across = 0xFFFF_7FFF_FFFF_F001
    assert flush_ranges.simple([across, 0xAAAA_AAAA_AAAA_A000], 48).tolist() == [[-edge, -edge]]
    assert flush_ranges.simple([across], 57).tolist() == [[-edge - 1, -edge]]
    assert flush_ranges.simple([0xFFFF_FFFF_FFFF_FFFE], 48).tolist() == [[-1, -1]]
    assert KvmLists().covered([0xFFFF_FFFF_FFFF_FFFE]).tolist() == [[-1, 0xFFD]]
    assert KvmLists(by_page=False).covered([across]).tolist() == []
    # a GiB that begins in the hole: what is left of it begins where linear addresses do
    hole = 0xFFFF_7FFF_E000_0000 | 1 << 11 | 1 << 12 | 1
    assert flush_ranges.extended([hole], 48).tolist() == [[-edge, -edge + (3 << 17) - 1]]
