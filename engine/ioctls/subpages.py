"""KVM_SUBPAGES_GET_ACCESS and KVM_SUBPAGES_SET_ACCESS, byte for byte (kvm-spp 1.3, 2.2, 2.3).

struct kvm_subpage of 2019 is u64 base_gfn, u64 npages, u32 access_map[64], and is copied whole. Later it is u64
gfn_base, u32 npages, u32 flags, u32 access_map[]: the header is read first, then header and maps. Both headers are
16 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.abi import VM, Call, Reply, failed
from engine.ioctls.partial_set import SubpageCalls
from engine.ioctls.registry import Ioctl, Target
from engine.kvm.enabling_checks import not_enabled
from engine.state.profiles import SubpageRows, kvm_version

HEADER = 16


@dataclass
class Subpage:
    """struct kvm_subpage as it was copied in: ``raw`` is all of it, ``access`` uint32[npages]."""

    gfn: int
    raw: bytearray
    access: NDArray[np.uint32]

    def fill(self, maps: NDArray[np.uint32]) -> bytes:
        """The structure with the first maps replaced."""
        self.raw[HEADER : HEADER + 4 * len(maps)] = maps.astype("<u4").tobytes()
        return bytes(self.raw)


def get_access(target: Target, call: Call) -> Reply:
    """KVM_SUBPAGES_GET_ACCESS: the number of pages. In 2019 a failure copies out what was read before it."""
    wanted = _copy_in(target, call)
    if isinstance(wanted, Reply):
        return wanted
    maps = SubpageCalls(target.vm).get(wanted.gfn, len(wanted.access))
    whole = len(maps) == len(wanted.access)
    if whole or kvm_version(target.profile).subpages.get_failure_copies:
        copied = call.user.copy_to(0, wanted.fill(maps))
        whole = whole and copied
    return Reply(len(maps)) if whole else failed("EFAULT")


def set_access(target: Target, call: Call) -> Reply:
    """KVM_SUBPAGES_SET_ACCESS: the number of pages, and the oddities of ``SubpageCalls.set``."""
    wanted = _copy_in(target, call)
    if isinstance(wanted, Reply):
        return wanted
    returns = SubpageCalls(target.vm).set(wanted.gfn, wanted.access)
    return failed("EFAULT") if returns is None else Reply(returns)


def _copy_in(target: Target, call: Call) -> Subpage | Reply:
    """The structure, or the answer that ends the call."""
    if not target.vm.spp_active:
        raise not_enabled()
    abi = kvm_version(target.profile).subpages
    return _fixed(abi, call) if abi.fixed_map else _flexible(abi, target, call)


def _fixed(abi: SubpageRows, call: Call) -> Subpage | Reply:
    raw = call.user.copy_from(0, HEADER + 4 * abi.max_pages)
    if raw is None:
        return failed("EFAULT")
    gfn, npages = struct.unpack_from("<QQ", raw)
    if npages > abi.max_pages:
        return failed(abi.too_many_errno)
    if npages == 0:
        return _empty(abi)
    return _subpage(gfn, npages, raw)


def _flexible(abi: SubpageRows, target: Target, call: Call) -> Subpage | Reply:
    header = call.user.copy_from(0, HEADER)
    if header is None:
        return failed("EFAULT")
    gfn, npages, flags = struct.unpack("<QII", header)
    if flags and abi.access_flags_errno is not None:
        return failed(abi.access_flags_errno)
    if npages > abi.max_pages:
        return failed(abi.too_many_errno)
    if npages == 0:
        return _empty(abi)
    target.vm.allocations.make_buffer()
    raw = call.user.copy_from(0, HEADER + 4 * npages)
    return failed("EFAULT") if raw is None else _subpage(gfn, npages, raw)


def _empty(abi: SubpageRows) -> Reply:
    return Reply(0) if abi.npages_zero_errno is None else failed(abi.npages_zero_errno)


def _subpage(gfn: int, npages: int, raw: bytes) -> Subpage:
    return Subpage(gfn, bytearray(raw), np.frombuffer(raw, dtype="<u4", count=npages, offset=HEADER).astype(np.uint32))


ROWS = (
    Ioctl("KVM_SUBPAGES_GET_ACCESS", VM, get_access, changes=False, allocates=True),
    Ioctl("KVM_SUBPAGES_SET_ACCESS", VM, set_access),
)
