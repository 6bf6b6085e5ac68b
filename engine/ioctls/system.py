"""Ioctls of /dev/kvm itself."""

from __future__ import annotations

from dataclasses import dataclass

from engine.abi import SYSTEM, Call, Reply, failed
from engine.ioctls.registry import Ioctl, Target

API_VERSION = 12


@dataclass(frozen=True)
class NewMachine(Reply):
    """KVM_CREATE_VM went well: whoever keeps the machines makes one, and answers with the number of its descriptor."""


def get_api_version(_: Target, call: Call) -> Reply:
    """KVM_GET_API_VERSION: 12, and EINVAL with any argument."""
    return failed("EINVAL") if call.arg else Reply(API_VERSION)


def create_vm(_: Target, call: Call) -> Reply:
    """KVM_CREATE_VM: the only machine type is 0."""
    return failed("EINVAL") if call.arg else NewMachine(0)


ROWS = (
    Ioctl("KVM_GET_API_VERSION", SYSTEM, get_api_version, changes=False),
    Ioctl("KVM_CREATE_VM", SYSTEM, create_vm, changes=False),
)
