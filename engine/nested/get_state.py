"""KVM_GET_NESTED_STATE: the size that is needed, the header, which pages follow."""

from __future__ import annotations

from dataclasses import dataclass

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch import vmx_msrs as vmx
from engine.arch.vmcs12 import VMCS12_PAGE, get
from engine.kvm.memory_views import GuestMemory, TrialMemory
from engine.nested import enlightened, svm
from engine.nested.transitions import refresh_vmcs12
from engine.vcpu.registers import active_secondary
from engine.vcpu.vcpu import EVMPTR_NONE, Vcpu

_BIG_ENOUGH = 0x4000


@dataclass(frozen=True)
class GetResult:
    """``returns`` is what ioctl(2) returns, ``errno`` its name, ``size`` the size that the state needs (0: unknown)."""

    returns: int
    errno: str | None
    size: int


def max_state_size(vcpu: Vcpu) -> int:
    """KVM_CHECK_EXTENSION(157): the largest state of this host, 0 when it has none."""
    if not vcpu.kvm.nested.hooks_always and not (vcpu.host.intel and vcpu.host.nested):
        return 0
    return abi.MAX_SIZE_VMX if vcpu.host.intel else abi.MAX_SIZE_SVM


def get_nested_state(vcpu: Vcpu, memory: GuestMemory, user: UserBuffer) -> GetResult:
    """KVM_GET_NESTED_STATE into ``user``, whose size field says how much room there is.

    E2BIG stores the needed size there and nothing else. Refreshes the cached vmcs12, as the kernel does.

    Both kernels copy pages beyond the size they report when L1 has a vmcs12 with VMCS shadowing and a link pointer,
    and when VMX vanished from CPUID. Here those bytes are stored as far as the buffer reaches and a fault
    among them is not reported.
    """
    if not max_state_size(vcpu):
        return GetResult(-1, "EINVAL", 0)
    raw = user.copy_from(4, 4)
    if raw is None:
        return GetResult(-1, "EFAULT", 0)
    room = int.from_bytes(raw, "little")
    if vcpu.host.intel:
        size, stored = _get_vmx(vcpu, memory, user, room)
    else:
        size, stored = _get_svm(vcpu, user, room)
    if not stored:
        return GetResult(-1, "EFAULT", size)
    if size > room:
        written = user.copy_to(4, size.to_bytes(4, "little"))
        return GetResult(-1, "E2BIG" if written else "EFAULT", size)
    return GetResult(0, None, size)


def read_nested_state(vcpu: Vcpu, memory: GuestMemory) -> bytes | None:
    """The blob that GET would give, 128, 4224 or 8320 bytes; None on a host without nested state. Changes nothing."""
    user = UserBuffer(bytearray(_BIG_ENOUGH))
    user.copy_to(4, _BIG_ENOUGH.to_bytes(4, "little"))
    result = get_nested_state(vcpu.copy(), TrialMemory(memory), user)
    return None if result.errno is not None else user.copy_from(0, result.size)


def _get_svm(vcpu: Vcpu, user: UserBuffer, room: int) -> tuple[int, bool]:
    # The room is compared with the header only: a buffer too small for the VMCB is filled and then refused.
    if room < abi.HEADER_SIZE:
        return abi.HEADER_SIZE, True
    blob = svm.get_state(vcpu)
    return len(blob), user.copy_to(0, blob)


def _get_vmx(vcpu: Vcpu, memory: GuestMemory, user: UserBuffer, room: int) -> tuple[int, bool]:
    header, size = _header(vcpu)
    if room < size:
        return size, True
    if not user.copy_to(0, header):
        return size, False
    if not vcpu.has_vmcs12:
        return size, True
    _refresh(vcpu, memory)
    state = vcpu.vmx
    stored = user.copy_to(abi.DATA_OFFSET, bytes(state.vmcs12))
    if _shadow_in_use(vcpu):
        shadow_stored = user.copy_to(abi.SHADOW_OFFSET, bytes(state.shadow))
        stored = stored and (shadow_stored or size <= abi.SHADOW_OFFSET)
    return size, stored or size <= abi.DATA_OFFSET


def _header(vcpu: Vcpu) -> tuple[bytes, int]:
    state, rows = vcpu.vmx, vcpu.kvm.nested
    flags = smm_flags = timer = deadline = 0
    vmxon_pa = vmcs12_pa = abi.NO_ADDRESS
    size = abi.HEADER_SIZE
    if vcpu.vmx_allowed and state.in_operation:
        vmxon_pa, vmcs12_pa = state.vmxon_pa, state.current_pa
        if vcpu.has_vmcs12:
            size += VMCS12_PAGE
            flags |= abi.EVMCS if _evmcs_reported(vcpu) else 0
            if state.guest_mode and _shadow_in_use(vcpu):
                size += VMCS12_PAGE
        smm_flags = (abi.SMM_VMXON if state.smm_vmxon else 0) | (abi.SMM_GUEST_MODE if state.smm_guest_mode else 0)
        if state.guest_mode:
            flags |= abi.GUEST_MODE | (abi.RUN_PENDING if state.run_pending else 0)
            flags |= abi.MTF_PENDING if state.mtf_pending else 0
            uses_timer = get(state.vmcs12, "pin_based_vm_exec_control") & vmx.PIN_PREEMPTION_TIMER
            if rows.reports_timer and uses_timer and state.deadline is not None:
                timer, deadline = abi.TIMER_DEADLINE, state.deadline
    header = bytearray(abi.HEADER_SIZE)
    for name, value in (("flags", flags), ("format", abi.FORMAT_VMX), ("size", size)):
        abi.COMMON.put(header, name, value)
    body = bytearray(abi.VMX_HEADER.size)
    for name, value in (
        ("vmxon_pa", vmxon_pa),
        ("vmcs12_pa", vmcs12_pa),
        ("smm_flags", smm_flags),
        ("flags", timer),
        ("preemption_timer_deadline", deadline),
    ):
        abi.VMX_HEADER.put(body, name, value)
    header[abi.COMMON.size :] = body
    return bytes(header), size


def _evmcs_reported(vcpu: Vcpu) -> bool:
    if vcpu.kvm.nested.map_pending:
        return vcpu.vmx.evmptr != EVMPTR_NONE
    return vcpu.vmx.evmcs_mapped


def _shadow_in_use(vcpu: Vcpu) -> bool:
    page = vcpu.vmx.vmcs12
    shadowing = active_secondary(page) & vmx.SEC_SHADOW_VMCS
    return bool(shadowing) and get(page, "vmcs_link_pointer") != abi.NO_ADDRESS


def _refresh(vcpu: Vcpu, memory: GuestMemory) -> None:
    """In L2 take the live registers; in L1 the enlightened VMCS, unless the cached vmcs12 is newer."""
    state = vcpu.vmx
    if state.guest_mode:
        refresh_vmcs12(vcpu)
    elif not state.sync_pending and state.evmcs_mapped:
        clean = 0 if vcpu.kvm.nested.get_ignores_clean else enlightened.clean_fields(vcpu, memory)
        enlightened.copy_in(vcpu, memory, clean)
