"""Records that are looked at side by side come to what the rule for one of them says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.arch.sppt import FULL_ACCESS
from engine.cpu import fastpath
from engine.jit import kernel
from engine.trace import lanes
from engine.trace.lanes import LANES
from engine.trace.served import GUARDED, miss, refuses

PAGES = (3, 5, 7, 9, 11, 4096 + 3, (1 << 40) - 1)
SIZES = (0, 1, 2, 8, 64, 127, 128, 255)
ABOVE = np.int64(1 << 16 | 2 << 32)


@kernel
def compiled(cache, gpas, sizes, words, at, above, seen, minding):  # type: ignore[no-untyped-def]
    """What all four say."""
    return (
        lanes.whole_columns(cache, gpas, sizes, at),
        lanes.whole_words(cache, words, at, above, seen),
        lanes.some_columns(cache, gpas, sizes, at, minding),
        lanes.some_words(cache, words, at, above, seen, minding),
    )


def table() -> np.ndarray:
    """Whole pages, a guarded one, one of which nothing may be written, and one without anything."""
    cache = np.full(fastpath.CACHE_WORDS, fastpath.EMPTY, dtype=np.int64)
    for gfn, writable in ((3, FULL_ACCESS), (5, 0x7FFF_FFFE), (7, FULL_ACCESS), (9, 0), ((1 << 40) - 1, 0xFFFF)):
        at = gfn & fastpath.CACHE_MASK
        cache[at] = gfn if writable == FULL_ACCESS else gfn | GUARDED
        cache[fastpath.PAGES + at] = writable
    return cache


def told(cache: np.ndarray, gpas: Any, mores: Any, minding: int) -> tuple[bool, tuple[int, int]]:
    """Whether all are whole; how many are served, and how many of these are guarded."""
    missed = [int(miss(cache, np.int64(g), np.int64(m))) for g, m in zip(gpas, mores, strict=True)]
    guarded = 0
    for lane, (gpa, more, what) in enumerate(zip(gpas, mores, missed, strict=True)):
        if what not in (0, int(GUARDED)) or (what and minding and refuses(cache, np.int64(gpa), np.int64(more))):
            return not any(missed), (lane, guarded)
        guarded += what != 0
    return not any(missed), (LANES, guarded)


def draw(rng: np.random.Generator, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and sizes; most are alike, so that long runs are served."""
    some = rng.random(2 * LANES) < spread
    pages = np.where(some, rng.choice(PAGES, 2 * LANES), rng.choice(PAGES[:3]))
    offsets = np.where(some, rng.integers(0, 4096, 2 * LANES), 128 * rng.integers(1, 31) + 8)
    sizes = np.where(some, rng.choice(SIZES, 2 * LANES), 8)
    return (pages << 12 | offsets).astype(np.int64), sizes.astype(np.uint8)


@pytest.mark.parametrize("minding", [-1, 0])
@pytest.mark.parametrize("spread", [0, 0.02, 0.3])
def test_all_lanes_say_what_the_rule_says_of_each_record(spread: float, minding: int) -> None:
    rng, cache, seen = np.random.default_rng(int(100 * spread)), table(), np.int64(-1)
    ends = set()
    for _ in range(300):
        gpas, sizes = draw(rng, spread)
        if rng.random() < 0.1:
            gpas[rng.integers(LANES)] |= np.int64(-1 << 63)
        words = np.stack([gpas, sizes.astype(np.int64) | ABOVE], axis=1).reshape(-1)
        odd = rng.integers(LANES) if rng.random() < 0.2 else None
        at = int(rng.integers(LANES))
        span = slice(at, at + LANES)
        mores = sizes.astype(np.int64) - 1
        whole, found = told(cache, gpas[span], mores[span], minding)
        if odd is not None:  # of another vCPU
            words[2 * (at + odd) + 1] ^= 1 << 33
        packed = ((words[1::2] & seen) ^ ABOVE) - 1
        whole_packed, found_packed = told(cache, gpas[span], packed[span], minding)
        answers = compiled(cache, gpas, sizes, words, np.uint64(at), ABOVE, seen, np.int64(minding))
        assert answers == (whole, whole_packed, found, found_packed)
        ends.add(found)
    assert len(ends) > 1


@pytest.mark.parametrize("lane", range(LANES))
def test_the_first_lane_that_is_not_served_counts(lane: int) -> None:
    cache, gpas, sizes = table(), np.full(LANES, 5 << 12 | 128, dtype=np.int64), np.full(LANES, 8, dtype=np.uint8)
    gpas[lane] = 5 << 12  # its first sub-page may not be written
    gpas[lane + 1 :] = 11 << 12
    words = np.stack([gpas, sizes.astype(np.int64) | ABOVE], axis=1).reshape(-1)
    at, every = np.uint64(0), np.int64(-1)
    whole, whole_packed, *found = compiled(cache, gpas, sizes, words, at, ABOVE, every, every)
    assert not whole and not whole_packed and found == [(lane, lane), (lane, lane)]


def test_bits_that_are_not_seen_make_no_difference() -> None:
    cache, gpas, sizes = table(), np.full(LANES, 3 << 12, dtype=np.int64), np.full(LANES, 8, dtype=np.uint8)
    words = np.stack([gpas, sizes.astype(np.int64) | ABOVE], axis=1).reshape(-1)
    words[1::4] |= 5 << 56
    none, seen = np.int64(0), ~np.int64(15 << 56)
    assert compiled(cache, gpas, sizes, words, np.uint64(0), ABOVE, seen, none)[1]
    assert not compiled(cache, gpas, sizes, words, np.uint64(0), ABOVE, np.int64(-1), none)[1]
