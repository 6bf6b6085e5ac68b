"""Differences that are known, each with the source that settles it; a run counts them apart. None is what it should be.

An entry goes when the engine does what the source says.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.differential.search import Difference
from tests.differential.vmcs12_layout import PAGE, USED

SECTIONS = (128, 128 + PAGE)


def _differing(found: Difference) -> list[int]:
    """Offsets of the bytes at the argument that differ."""
    (_, mine, _), (_, its, _) = found.engine.told(), found.model.told()
    return [at for at, (one, other) in enumerate(zip(mine or b"", its or b"", strict=False)) if one != other]


def _copy_that_faults_half_way(found: Difference) -> bool:
    """KVM_SET_NESTED_STATE, V16 and V20b: what comes before the fault has been copied (copy_from_user)."""
    blobs = [call.data or b"" for call in found.calls if call.name == "KVM_SET_NESTED_STATE"]
    faulting = any(start < len(blob) < start + USED for blob in blobs for start in SECTIONS)
    return found.call.name == "KVM_GET_NESTED_STATE" and faulting and min(_differing(found), default=0) >= SECTIONS[0]


def _cpuid_after_vm_entry(found: Difference) -> bool:
    """KVM_GET_CPUID2 in 5.3: CR4 of a VM entry or exit does not show (kvm_set_cr4 updates it, vmx_set_cr4 not)."""
    entered = any(call.name == "KVM_SET_NESTED_STATE" for call in found.calls)
    return not found.world.latest and found.call.name == "KVM_GET_CPUID2" and entered


UNSETTLED: dict[str, Callable[[Difference], bool]] = {
    "a copy that faults half way": _copy_that_faults_half_way,
    "CPUID after a VM entry": _cpuid_after_vm_entry,
}


def unsettled(found: Difference) -> str | None:
    """The name of the entry that a difference is of, if any."""
    return next((name for name, is_of in UNSETTLED.items() if is_of(found)), None)
