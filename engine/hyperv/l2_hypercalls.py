"""Direct flush: whether the lower hypervisor serves a hypercall of L2 by itself, and what L1 sees of it.

The lower hypervisor (L0) looks at nothing but the call code of L2, and only where L1 asked it to: through its VP assist
page and through the enlightened VMCS or VMCB of the nested guest. Whatever it does not serve is an ordinary exit to L1.
The rows are D1 to D11 of docs/tlb-flush.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import hypercall as hv
from engine.arch import hyperv_cpuid as leaves
from engine.arch.hyperv_pages import SVM_EXIT_ENLIGHTENED, SVM_TRAP_AFTER_FLUSH, VMX_EXIT_TRAP_AFTER_FLUSH
from engine.hyperv.caller import Caller
from engine.hyperv.privileges import Privileges

EXIT_VMCALL = 18
SVM_EXIT_VMMCALL = 0x81


@dataclass(frozen=True)
class NestedGuest:
    """The nested guest that a vCPU runs, as L0 sees it.

    ``enlightened``: an enlightened VMCS is in use (with SVM: always, the area is part of the VMCB). ``asks`` is
    NestedFlushVirtualHypercall, which KVM reads from the enlightened VMCS as it is now and, with SVM, from its copy of
    VMRUN; ``direct`` is DirectHypercall in L0's copy of the VP assist page. ``vm_id``, ``vp_id`` and ``assist_page``
    are as last loaded. ``intercepts`` is L1's intercept of VMMCALL.
    """

    svm: bool = False
    enlightened: bool = True
    asks: bool = True
    direct: bool = True
    vm_id: int = 0
    vp_id: int = 0
    assist_page: int = 0
    intercepts: bool = True


@dataclass(frozen=True)
class Exit:
    """A VM exit to L1. With SVM ``qualification`` is EXITINFO1 and ``information`` EXITINFO2."""

    reason: int
    qualification: int = 0
    information: int = 0
    instruction_length: int = hv.INSTRUCTION_LENGTH


@dataclass(frozen=True)
class Route:
    """Where a call of L2 goes, and the row of the table that says so.

    ``reflected``: L1 gets an exit and L2's RIP stays; ``served``: by L0, as far as its rules let it.
    """

    row: str
    served: bool


def route(caller: Caller, privileges: Privileges, guest: NestedGuest) -> Route:
    """The rows before the call itself is looked into. ``privileges`` are L1's."""
    if not privileges.nested_eax & leaves.NESTED_EAX_DIRECT_FLUSH:
        return Route("D1", served=False)
    if not guest.svm and not guest.enlightened:
        return Route("D2", served=False)
    if not guest.asks:
        return Route("D3", served=False)
    if not guest.direct:
        return Route("D4", served=False)
    if caller.code_register not in hv.VIRTUAL_CALLS:
        return Route("D5", served=False)
    return Route("D6" if caller.undefined else "D8", served=True)


def reflected(guest: NestedGuest) -> Exit | None:
    """The exit that L1 gets for a call that L0 does not serve; None where L1 lets VMMCALL through to L0."""
    if not guest.svm:
        return Exit(EXIT_VMCALL)
    return Exit(SVM_EXIT_VMMCALL) if guest.intercepts else None


def after_flush(guest: NestedGuest) -> Exit:
    """The exit that tells an L1 which holds a TLB lock that L2 flushed; L2 is past the instruction already."""
    if guest.svm:
        return Exit(SVM_EXIT_ENLIGHTENED, SVM_TRAP_AFTER_FLUSH)
    return Exit(VMX_EXIT_TRAP_AFTER_FLUSH)
