"""How GET_ACCESS and SET_ACCESS of the two series differ for whoever calls them (kvm-spp 1.2, 1.3, 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class AccessAbi(NamedTuple):
    """The fields of ``Profile`` that the binary ABI reads."""

    max_pages: int
    npages_zero_errno: str | None  # None: returns 0
    fixed_map: bool  # the struct has room for max_pages maps, and is copied whole
    get_failure_copies: bool  # a GET that fails copies the maps before the failing page out
    set_with_hole: str  # what a SET that meets a page without a slot has done: "applied" or "stored" the pages before
    hole_after_mapped_returns_zero: bool  # such a SET returns 0 where a page before was mapped
    check_extension: int
    capability: int | None


ABI: Mapping[str, AccessAbi] = MappingProxyType(
    {
        "kvm-2019": AccessAbi(64, "EINVAL", True, True, "applied", True, 0, None),
        "kvm-latest": AccessAbi(512, None, False, False, "stored", False, 512, 182),
    }
)
