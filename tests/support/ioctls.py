"""The binary ABI as a C program would use it, over HTTP."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import httpx2

PROFILES = ("kvm-2019", "kvm-latest")
PAGES = {"kvm-2019": 64, "kvm-latest": 512}
CAP_X86_SPP = 182
FULL = 0xFFFF_FFFF


@dataclass(frozen=True)
class Result:
    """What one ioctl returned: its value, errno by name, the bytes at the argument and the other memory."""

    returns: int
    errno: str | None
    data: bytes | None
    memory: list[bytes]

    @property
    def short(self) -> int | str:
        """The value, or the errno of a call that failed."""
        return self.errno if self.errno is not None else self.returns


def ioctl(client: httpx2.Client, url: str, name: str, data: bytes | None = None, **members: Any) -> Result:
    """Call an ioctl of the VM, vCPU or system at ``url``; every reply must be 200."""
    body = {**({"data": data.hex()} if data is not None else {}), **members}
    reply = client.post(f"{url}/ioctls/{name}", json=body)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert (told["errno"] is None) == (told["return"] >= 0)
    assert told["return"] >= -1
    back = bytes.fromhex(told["data"]) if told["data"] is not None else None
    return Result(told["return"], told["errno"], back, [bytes.fromhex(part["data"]) for part in told["memory"]])


def subpage(profile: str, gfn: int, access: list[int], npages: int | None = None, flags: int = 0) -> bytes:
    """struct kvm_subpage of an era, with room for the maps given, or for all of them where the array is fixed."""
    count = len(access) if npages is None else npages
    if profile == "kvm-2019":
        return struct.pack("<QQ", gfn, count) + struct.pack("<64I", *(access + [0] * 64)[:64])
    return struct.pack("<QII", gfn, count, flags) + struct.pack(f"<{len(access)}I", *access)


def maps_of(data: bytes | None, count: int) -> list[int]:
    """The first maps in a struct kvm_subpage."""
    assert data is not None
    return list(struct.unpack_from(f"<{count}I", data, 16))


def enable(client: httpx2.Client, url: str, profile: str) -> Result:
    """Switch SPP on as the era does."""
    if profile == "kvm-2019":
        return ioctl(client, url, "KVM_INIT_SPP", arg="0x0")
    return ioctl(client, url, "KVM_ENABLE_CAP", enable_cap(CAP_X86_SPP))


def enable_cap(cap: int, flags: int = 0, *args: int) -> bytes:
    """struct kvm_enable_cap, 104 bytes."""
    return struct.pack("<II4Q", cap, flags, *[*args, 0, 0, 0, 0][:4]) + bytes(64)


def region(slot: int, flags: int, gpa: int, size: int, address: int = 0x7F00_0000_0000) -> bytes:
    """struct kvm_userspace_memory_region, 32 bytes."""
    return struct.pack("<IIQQQ", slot, flags, gpa, size, address)


def set_access(client: httpx2.Client, url: str, profile: str, gfn: int, access: list[int]) -> Result:
    """KVM_SUBPAGES_SET_ACCESS."""
    return ioctl(client, url, "KVM_SUBPAGES_SET_ACCESS", subpage(profile, gfn, access))


def get_access(client: httpx2.Client, url: str, profile: str, gfn: int, npages: int = 1) -> Result:
    """KVM_SUBPAGES_GET_ACCESS."""
    return ioctl(client, url, "KVM_SUBPAGES_GET_ACCESS", subpage(profile, gfn, [0] * npages))
