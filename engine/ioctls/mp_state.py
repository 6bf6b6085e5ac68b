"""KVM_GET_MP_STATE and KVM_SET_MP_STATE: whether a vCPU runs, and what it waits for.

Source: Linux 5.3 and 7.1, kvm_arch_vcpu_ioctl_set_mpstate and kvm_apic_accept_events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.arch import kvm_vcpu_structs as abi
from engine.ioctls.registry import Target, offered
from engine.ioctls.vcpu_rows import getting, setting
from engine.kvm.memory_views import GuestMemory
from engine.vcpu.vcpu import Vcpu

CAP_MP_STATE = 14
SIZE = 4

_NAMES = {
    abi.MP_RUNNABLE: "runnable",
    abi.MP_UNINITIALIZED: "uninitialized",
    abi.MP_INIT_RECEIVED: "wait-for-sipi",
    abi.MP_HALTED: "halted",
    abi.MP_SIPI_RECEIVED: "sipi-received",
    abi.MP_AP_RESET_HOLD: "ap-reset-hold",
}
_NUMBERS = {name: number for number, name in _NAMES.items()}
_AFTER_INIT = (abi.MP_INIT_RECEIVED, abi.MP_SIPI_RECEIVED)


def mp_state_bytes(vcpu: Vcpu) -> bytes:
    """struct kvm_mp_state."""
    state = vcpu.mp_state
    number = _NUMBERS[state] if state in _NUMBERS else int(state)
    return number.to_bytes(SIZE, "little")


def set_mp_state(vcpu: Vcpu, _: GuestMemory, raw: bytes) -> str | None:
    """Without a local APIC in the kernel a vCPU is runnable and nothing else; with one 2019 takes any number.

    Whoever has received a SIPI starts at its vector, at once: the next look at the vCPU would find it so.
    """
    number, rules = int.from_bytes(raw, "little"), vcpu.kvm.vcpu
    unknown = rules.mp_states_known and number not in _NAMES
    if unknown or (not vcpu.lapic_in_kernel and number != abi.MP_RUNNABLE):
        return "EINVAL"
    if rules.smm_excludes_waiting and number in _AFTER_INIT and (vcpu.smm or vcpu.registers.get("smi_pending", 0)):
        return "EINVAL"
    if number == abi.MP_SIPI_RECEIVED:
        number = abi.MP_INIT_RECEIVED if vcpu.smm else abi.MP_RUNNABLE
        if not vcpu.smm:
            _start(vcpu.registers, vcpu.registers.get("sipi_vector", 0))
    vcpu.mp_state = _NAMES.get(number, str(number))
    return None


def _start(registers: dict[str, int], vector: int) -> None:
    registers["cs_selector"], registers["cs_base"], registers["rip"] = vector << 8, vector << 12, 0


CHECKED: Mapping[int, Callable[[Target], int]] = MappingProxyType({CAP_MP_STATE: offered})

ROWS = (getting("MP_STATE", mp_state_bytes), setting("MP_STATE", SIZE, set_mp_state))
