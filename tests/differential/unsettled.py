"""Differences that are known, each with the source that settles it; a run counts them apart. None is what it should be.

An entry goes when the engine does what the source says.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.differential.search import Difference


def _cpuid_after_vm_entry(found: Difference) -> bool:
    """KVM_GET_CPUID2 in 5.3: CR4 of a VM entry or exit does not show (kvm_set_cr4 updates it, vmx_set_cr4 not).

    The engine keeps no CPUID of an earlier CR4; `docs/profiles.md` says so.
    """
    entered = any(call.name == "KVM_SET_NESTED_STATE" for call in found.calls)
    return not found.world.latest and found.call.name == "KVM_GET_CPUID2" and entered


UNSETTLED: dict[str, Callable[[Difference], bool]] = {
    "CPUID after a VM entry": _cpuid_after_vm_entry,
}


def unsettled(found: Difference) -> str | None:
    """The name of the entry that a difference is of, if any."""
    return next((name for name, is_of in UNSETTLED.items() if is_of(found)), None)
