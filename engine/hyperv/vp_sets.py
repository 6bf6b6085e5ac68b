"""Sets of virtual processors: a mask of the first 64, or HV_VP_SET with its banks of 64 (TLFS, virtual processor sets).

A set is int64[64]: bit n of word b stands for number b * 64 + n, as ``cpu.tlb_select`` reads it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import hypercall as hv
from engine.arch.words import signed
from engine.cpu import tlb_select

VpBits = NDArray[np.int64]


def nobody() -> VpBits:
    """The empty set."""
    return np.zeros(hv.BANKS, dtype=np.int64)


def of_mask(mask: int) -> VpBits:
    """A set of the first 64."""
    return of_banks(1, (mask,))


def of_banks(valid: int, banks: tuple[int, ...]) -> VpBits:
    """A set from its banks: those of ``valid`` in ascending order. Banks that are missing are empty."""
    found = nobody()
    present = [bank for bank in range(hv.BANKS) if valid >> bank & 1]
    for bank, word in zip(present, banks, strict=False):
        found[bank] = signed(word)
    return found


def banks_fit(valid: int, banks: int) -> bool:
    """Whether there are as many banks as ``valid`` has bits."""
    return valid.bit_count() == banks


def member(vps: VpBits, number: int) -> bool:
    """Whether a number is in a set. Numbers that a set cannot hold are in none."""
    return bool(tlb_select.member(vps, number))
