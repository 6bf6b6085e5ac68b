"""GET_ACCESS and SET_ACCESS as the binary ABI of each kernel has them: with limits, and with what a failure leaves.

Everything else of the service sets maps all or nothing; here a SET that meets a page without a slot has done part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames
from engine.kvm import bitmaps, spp_set
from engine.kvm.slots import first_page_without_slot
from engine.machine import VirtualMachine
from engine.state.profiles import kvm_version
from engine.state.retry import new_trail, run_all

# The first page number that no slot can have, and that a kernel's 64-bit arithmetic still holds.
END = 1 << 52

Words = NDArray[np.uint32]


class SubpageCalls:
    """GET and SET of one machine."""

    def __init__(self, vm: VirtualMachine) -> None:
        self._abi = kvm_version(vm.config.profile).subpages
        self._state = vm.state

    def get(self, gfn: int, npages: int) -> Words:
        """Effective maps from ``gfn`` up to the first page without a slot: uint32, ``npages`` of them if all have."""
        state = self._state.current
        snapshot = state.snapshot
        maps = np.empty(_pages_with_slot(snapshot.machine, gfn, npages), dtype=np.uint32)
        if len(maps):
            bitmaps.read_maps(snapshot.machine, gfn, 0, maps)
        return maps

    def set(self, gfn: int, access: Words) -> int | None:
        """Replace the maps of consecutive pages; returns how many, or None for EFAULT, at a page without a slot.

        The pages before that one are changed: their maps and mappings in the kernel of ``KVM_INIT_SPP``, which forgets
        to fail (0) if one of them was mapped; their maps alone later, so that a page that may be written stays so
        until it is mapped anew.
        """
        state = self._state.current
        before = _pages_with_slot(state.snapshot.machine, gfn, len(access))
        whole = before == len(access)
        returns: int | None = before if whole else None
        done = access[:before]
        with self._state.change() as draft:
            if whole or self._abi.set_with_hole == "applied":
                trail = new_trail()
                if before and not whole and self._abi.hole_after_mapped_returns_zero:
                    returns = 0 if spp_set.any_mapped(draft.machine, gfn, before, trail) else None
                run_all(draft, before, lambda start: spp_set.set_maps(draft.machine, gfn, done, start, trail))
            else:
                if gfn < END:
                    spp_set.invalidate_regions(draft.machine, gfn, min(len(access), END - gfn))
                run_all(draft, before, lambda start: spp_set.store_maps(draft.machine, gfn, done, start))
        return returns


def _pages_with_slot(machine: frames.Machine, gfn: int, npages: int) -> int:
    """Pages from ``gfn`` before the first that has no slot."""
    if gfn >= END:
        return 0
    missing = int(first_page_without_slot(machine, gfn, npages))
    return npages if missing < 0 else missing - gfn
