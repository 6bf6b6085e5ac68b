"""Between a guest and its nested guest: what the caches and queues of a vCPU have to know of the change.

In L2 a vCPU's translations carry the ids of the nested guest and are in a VPID of their own. A flush that was asked
for while it was in the other mode is in the queue of that mode: each transition has the vCPU look again.
"""

from __future__ import annotations

from dataclasses import replace

from engine.arch import controls as ctl
from engine.arch.hyperv_pages import VMCB_ENLIGHTENMENTS, VMCB_ENLIGHTENMENTS_AT, VP_ASSIST
from engine.arch.words import signed
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine
from engine.hyperv import flush_execution, nested_paging, queues
from engine.hyperv.privileges import Privileges
from engine.kvm.memory_views import GuestMemory
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID, HV_VP_ASSIST_PAGE
from engine.vcpu.vcpu import Enlightenment, Vcpu

# Tells the VPIDs of nested guests from those of guests.
NESTED_VPID = 1 << 15
_ASSIST_ENABLED = 1
_ASSIST_READ = 56


def lower_of(vcpu: Vcpu) -> Enlightenment:
    """What the lower hypervisor remembers of the vCPU's nested guest."""
    return vcpu.vmx.lower if vcpu.host.intel else vcpu.svm.lower


def in_nested_guest(vcpu: Vcpu) -> bool:
    """Whether the vCPU runs a nested guest now."""
    return vcpu.vmx.guest_mode or vcpu.svm.guest_mode


def follow(m: Machine, frame: int, before: Vcpu | None, after: Vcpu, memory: GuestMemory) -> None:
    """Bring the record in ``frame`` and the cache in line with a vCPU that changed from ``before`` (None: fresh)."""
    was_nested = bool(frames.read_word(m, frame, ctl.V_GUEST_MODE))
    if after.svm.guest_mode and not was_nested:
        after.svm.lower = _from_vmcb(after, memory)
    position = frame - int(FIRST_VCPU_FRAME)
    lower, old = lower_of(after), Enlightenment() if before is None else lower_of(before)
    if (lower.vm_id, lower.vp_id) != (old.vm_id, old.vp_id):
        flush_execution.drop_nested(m, position)
    nested = in_nested_guest(after)
    tag = lower.vp_id << ctl.NESTED_VP_SHIFT | ctl.NESTED_RUNS if nested else 0
    frames.write_word(m, frame, ctl.V_NESTED, signed(tag))
    frames.write_word(m, frame, ctl.V_NESTED_VM, signed(lower.vm_id) if nested else 0)
    frames.write_word(m, frame, ctl.V_NESTED_ROOT, nested_paging.root_of(after))
    if nested != was_nested:
        vpid = int(frames.read_word(m, frame, ctl.V_VPID))
        frames.write_word(m, frame, ctl.V_VPID, vpid | NESTED_VPID if nested else vpid & ~NESTED_VPID)
        queues.request(m.queues, position)


def _from_vmcb(vcpu: Vcpu, memory: GuestMemory) -> Enlightenment:
    """What VMRUN takes over from the VMCB, if the guest uses Hyper-V's hypercalls at all."""
    privileges = Privileges.of(vcpu.cpuid, vcpu.msrs.get(HV_GUEST_OS_ID, 0))
    if not privileges.enabled:
        return replace(vcpu.svm.lower, control=0)
    area = bytes(vcpu.svm.vmcb12[VMCB_ENLIGHTENMENTS_AT : VMCB_ENLIGHTENMENTS_AT + VMCB_ENLIGHTENMENTS.size])
    where = vcpu.msrs.get(HV_VP_ASSIST_PAGE, 0)
    assist = memory.read(where & ~0xFFF, _ASSIST_READ) if where & _ASSIST_ENABLED else None
    return Enlightenment(
        vm_id=VMCB_ENLIGHTENMENTS.get(area, "hv_vm_id"),
        vp_id=VMCB_ENLIGHTENMENTS.get(area, "hv_vp_id"),
        partition_page=VMCB_ENLIGHTENMENTS.get(area, "partition_assist_page"),
        features=0 if assist is None else VP_ASSIST.get(assist, "nested_features"),
        control=VMCB_ENLIGHTENMENTS.get(area, "hv_enlightenments_control"),
    )
