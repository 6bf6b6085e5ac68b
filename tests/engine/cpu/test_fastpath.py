"""The derived cache in front of the walk: it serves a page until it is told otherwise, and never by mistake.

What it holds is seen through the loop that it is made for.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.cpu import fastpath, frames
from engine.kvm import state_frame as reg
from engine.trace.columns import TraceChunk
from engine.trace.serving import BUT_LENGTH, WHOLE, serve
from engine.trace.session import run_of
from tests.engine.builders import FULL, READ, WRITE, bare_draft, records


@pytest.fixture
def m() -> frames.Machine:
    return bare_draft().machine


def run(m: frames.Machine, rows: np.ndarray, seen: int = WHOLE) -> tuple[int, int, int]:
    """How many records are served from the cache, and the writes and guarded writes among them."""
    tally = np.zeros(len(reg.COUNTERS), dtype=np.int64)
    position = serve(m.cache, m.vcpu_of_id, run_of(TraceChunk(rows, None, {}), 0, len(rows)), 0, np.int64(seen), tally)
    return int(position), int(tally[reg.WRITES]), int(tally[reg.PAGE_GRANULAR])


def served(m: frames.Machine, gpa: int, access: int = WRITE, size: int = 8) -> bool:
    """Whether an access needs nothing but the cache."""
    position, writes, _ = run(m, records([(gpa, size, access)]))
    assert (position, writes) in {(0, 0), (1, int(access == WRITE))}
    return bool(position)


def remember(m: frames.Machine, gfn: int, writable: int) -> None:
    fastpath.remember(m, np.int64(gfn), np.int64(writable))


@pytest.mark.parametrize("gfn", [0, 1, 4095, 4096, (1 << 40) - 1])
def test_page_is_served_once_it_is_known(m: frames.Machine, gfn: int) -> None:
    assert not served(m, gfn << 12)
    remember(m, gfn, FULL)
    assert served(m, gfn << 12) and served(m, (gfn << 12) + 4088)
    assert not served(m, (gfn ^ 1) << 12)


@pytest.mark.parametrize("subpage", [0, 1, 30, 31])
def test_only_sub_pages_that_may_be_written_are_served(m: frames.Machine, subpage: int) -> None:
    remember(m, 5, 1 << subpage)
    at = 0x5000 + 128 * subpage
    assert served(m, at) and served(m, at, size=128) and served(m, at + 127, size=1)
    assert not served(m, at ^ 0x80)
    if subpage < 31:
        assert not served(m, at + 124), "the second sub-page refuses"
    assert served(m, at ^ 0x80, READ)


def test_access_to_two_pages_is_not_served(m: frames.Machine) -> None:
    remember(m, 5, FULL)
    remember(m, 6, FULL)
    assert not served(m, 0x5FFC)
    assert served(m, 0x5FF8)


def test_pages_with_the_same_place_push_each_other_out(m: frames.Machine) -> None:
    remember(m, 5, FULL)
    remember(m, 5 + 4096, FULL)
    assert not served(m, 0x5000)
    assert served(m, (5 + 4096) << 12)


def test_forgetting_a_page_leaves_the_one_that_took_its_place(m: frames.Machine) -> None:
    remember(m, 5 + 4096, FULL)
    fastpath.forget(m, np.int64(5))
    assert served(m, (5 + 4096) << 12)
    fastpath.forget(m, np.int64(5 + 4096))
    assert not served(m, (5 + 4096) << 12)


def test_forgetting_everything(m: frames.Machine) -> None:
    for gfn in (1, 2, 3):
        remember(m, gfn, FULL)
    fastpath.forget_all(m)
    assert not any(served(m, gfn << 12) for gfn in (1, 2, 3))


@pytest.mark.parametrize("gpa", [0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FF00_0000, 1 << 63, 1 << 52])
@pytest.mark.parametrize("access", [READ, WRITE])
def test_empty_cache_serves_no_address(m: frames.Machine, gpa: int, access: int) -> None:
    assert not served(m, gpa, access)


BAD = [
    ("all ones above the size", 0xFFFF_FFFF_FFFF_0008),
    ("access 255", 8 | 0xFF << 16),
    ("reserved byte", 8 | 1 << 24),
    ("unknown vCPU", 8 | 1 << 32),
    ("reserved half word", 8 | 1 << 48),
    ("size 0", 1 << 16),
]


@pytest.mark.parametrize("word", [row[1] for row in BAD], ids=[row[0] for row in BAD])
@pytest.mark.parametrize("before", [[], [(0x5000, 8, READ)]], ids=["first", "after a good one"])
@pytest.mark.parametrize("offset", [0, 8])
def test_record_that_is_no_access_is_never_served(
    m: frames.Machine, word: int, before: list[tuple[int, int, int]], offset: int
) -> None:
    remember(m, 5, FULL)
    words = np.concatenate([records(before), np.array([[0x5000 + offset, word]], dtype=np.uint64)])
    assert run(m, words)[0] == len(before)


def test_reserved_bits_are_no_part_of_the_size(m: frames.Machine) -> None:
    """As a size, bit 24 would reach the page that is kept in the place of the first."""
    remember(m, 5 + 4096, FULL)
    word = 8 | 1 << 16
    following = np.array([[(5 + 4096) << 12, word], [0x5000, word | 1 << 24]], dtype=np.uint64)
    assert run(m, following)[0] == 1


def test_writes_and_guarded_writes_are_counted(m: frames.Machine) -> None:
    remember(m, 5, FULL)
    remember(m, 6, 1)
    rows = [(0x5000,), (0x5000, 8, READ), (0x6000,), (0x6000, 8, READ), (0x6000,), (0x5000,), (0x6080,)]
    assert run(m, records(rows)) == (6, 4, 2)


def denial(m: frames.Machine, gpa: int, size: int = 8) -> tuple[int, int]:
    """How the cache says that a write ends."""
    qualification, refused = fastpath.denial(m, np.int64(gpa), np.int64(size))
    return int(qualification), int(refused)


@pytest.mark.parametrize("writable", [0, 0xF])
def test_known_refusal_answers_for_every_other_sub_page(m: frames.Machine, writable: int) -> None:
    remember(m, 5, writable)
    assert denial(m, 0x5200)[0] == 0, "refused, but nobody knows how"
    fastpath.remember_denial(m, np.int64(5), np.int64(writable), np.int64(0x1AA))
    assert denial(m, 0x5200) == (0x1AA, 1 << 4)
    assert denial(m, 0x51FC) == (0x1AA, 1 << 4 | (0 if writable else 1 << 3))
    assert denial(m, 0x5F80, 128) == (0x1AA, 1 << 31)
    assert denial(m, 0x5FFC) == (0, 0), "over two pages"
    assert denial(m, 0x6200) == (0, 0), "another page"
    if writable:
        assert denial(m, 0x5000) == (0, 0), "allowed"
        assert served(m, 0x5000)
    assert not served(m, 0x5200) and served(m, 0x5200, READ)


def test_refusal_is_not_known_before_the_allowed_part_of_the_page_is(m: frames.Machine) -> None:
    """A write that the map allows may still have flags to set."""
    fastpath.remember_denial(m, np.int64(5), np.int64(0xF), np.int64(0x1AA))
    assert denial(m, 0x5200) == (0, 0)
    assert not served(m, 0x5000)


def test_instruction_length_counts_only_where_it_may_not_be_given(m: frames.Machine) -> None:
    remember(m, 5, FULL)
    lengths = [records([(0x5000,)])[0] | np.array([0, length << 50], dtype=np.uint64) for length in (0, 15, 4)]
    assert run(m, np.array(lengths), BUT_LENGTH) == (3, 3, 0)
    assert run(m, np.array(lengths), WHOLE) == (1, 1, 0)
