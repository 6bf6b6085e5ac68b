"""What a KVM does otherwise than the other, as compiled kernels read it: bits of ``Machine.caps[CAP_KVM]``.

Each is a row of ``SubpageRows`` in ``engine.state.profiles``, which says what it means; no kernel depends on that
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engine.cpu.frames import CAP_KVM
from engine.jit import kernel

KVM_FILL_IN_SET = 1 << 0
KVM_FILL_REGION = 1 << 1
KVM_SAVED_BIT = 1 << 2
KVM_FORCE_SMALL = 1 << 3
KVM_SET_ZAPS = 1 << 4
KVM_MISS_NEEDS_SLOT = 1 << 5
KVM_EMULATOR_CHECKS = 1 << 6
KVM_MARKS_SPECIAL = 1 << 7
KVM_REFUSES_DELIVERY = 1 << 8

BITS: Mapping[str, int] = MappingProxyType(
    {
        "fill_in_set": KVM_FILL_IN_SET,
        "fill_region": KVM_FILL_REGION,
        "saved_bit": KVM_SAVED_BIT,
        "force_small": KVM_FORCE_SMALL,
        "set_zaps": KVM_SET_ZAPS,
        "miss_needs_slot": KVM_MISS_NEEDS_SLOT,
        "emulator_checks": KVM_EMULATOR_CHECKS,
        "marks_special": KVM_MARKS_SPECIAL,
        "refuses_delivery": KVM_REFUSES_DELIVERY,
    }
)


def caps(rows: object) -> int:
    """The word for a kernel's rows, which have a truth value by each name of BITS."""
    return sum(bit for name, bit in BITS.items() if getattr(rows, name))


@kernel
def chooses(m, choice):
    """Whether the machine's KVM makes a choice."""
    return m.caps[CAP_KVM] & choice != 0
