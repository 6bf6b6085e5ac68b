"""Differences that are known, each with the source that settles it; a run counts them apart. Empty is what it should be.

An entry goes when the engine does what the source says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.differential.search import Difference
from tests.differential.vcpu_model import APIC, CONTROL, LA57, OSXSAVE, PKE, VMXE, X2APIC

WITHIN_CR4 = range(CONTROL + 24, CONTROL + 32)


def _differing(found: Difference) -> Iterator[tuple[int, int]]:
    """Offsets of the bytes at the argument that differ, and the bits."""
    (_, mine, _), (_, its, _) = found.engine.told(), found.model.told()
    for at, (one, other) in enumerate(zip(mine or b"", its or b"", strict=False)):
        if one != other:
            yield at, one ^ other


def _cpuid_follows_registers(found: Difference) -> bool:
    """KVM_GET_CPUID2: CR4.OSXSAVE, CR4.PKE and APIC_BASE's enable bit show (`cpuid.c`, kvm_update_cpuid)."""
    rows = {1: {23: 1 << 3, 25: 1 << 1}, 7: {20: 1 << 4}}
    data = found.model.data or b""

    def followed(at: int, bits: int) -> bool:
        entry, within = divmod(at - 8, 40)
        function = int.from_bytes(data[8 + 40 * entry : 12 + 40 * entry], "little")
        return not bits & ~rows.get(function, {}).get(within, 0)

    return found.call.name == "KVM_GET_CPUID2" and all(followed(at, bits) for at, bits in _differing(found))


def _host_writes_of_feature_control(found: Difference) -> bool:
    """KVM_SET_MSRS of 0x3A in 7.1: the host may write every bit that KVM has (`vmx.c`)."""
    return found.call.name == "KVM_SET_MSRS" and found.world.latest


def _control_registers(found: Difference) -> bool:
    """KVM_SET_SREGS: CR4.VMXE without VMX, CR4.LA57 without LA57, x2APIC without xAPIC (`x86.c`, `lapic.c`)."""
    sets = [call.data or b"" for call in found.calls if call.name == "KVM_SET_SREGS" and len(call.data or b"") >= 312]
    for raw in sets:
        cr4, apic = (int.from_bytes(raw[at : at + 8], "little") for at in (CONTROL + 24, CONTROL + 48))
        if cr4 & (VMXE | LA57 | OSXSAVE | PKE) or apic & (APIC | X2APIC) == X2APIC:
            return found.call.name in {"KVM_SET_SREGS", "KVM_GET_SREGS"}
    return False


def _copy_that_faults_half_way(found: Difference) -> bool:
    """KVM_SET_NESTED_STATE, V16 and V20b: what comes before the fault has been copied (copy_from_user)."""
    short = [
        call
        for call in found.calls
        if call.name == "KVM_SET_NESTED_STATE" and 128 < len(call.data or b"") < 5222
    ]
    return found.call.name == "KVM_GET_NESTED_STATE" and bool(short)


def _width_needs_the_highest_leaf(found: Difference) -> bool:
    """MAXPHYADDR is 36 where leaf 0x80000000 does not lead to 0x80000008 (`cpuid.c`, cpuid_query_maxphyaddr)."""
    tables = [call.data or b"" for call in found.calls if call.name == "KVM_SET_CPUID2"]
    leaves = [{raw[at : at + 4] for at in range(8, len(raw), 40)} for raw in tables]
    return any(b"\x08\0\0\x80" in table and b"\0\0\0\x80" not in table for table in leaves)


UNSETTLED: dict[str, Callable[[Difference], bool]] = {
    "CPUID follows registers": _cpuid_follows_registers,
    "host writes of IA32_FEATURE_CONTROL": _host_writes_of_feature_control,
    "control registers that cannot be together": _control_registers,
    "a copy that faults half way": _copy_that_faults_half_way,
    "the width needs the highest leaf": _width_needs_the_highest_leaf,
}


def unsettled(found: Difference) -> str | None:
    """The name of the entry that a difference is of, if any."""
    return next((name for name, is_of in UNSETTLED.items() if is_of(found)), None)
