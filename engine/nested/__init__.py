"""Nested VMX state and the enlightened VMCS: what KVM keeps for a guest that runs its own guests.

``NestedVcpu`` is the state of one vCPU. The operations take it together with the guest's memory and change it in
place; ``explain_nested_state`` and ``read_nested_state`` do not.
"""

from engine.abi import Reply, UserBuffer, UserMemory
from engine.kvm.trial_memory import GuestMemory, NoMemory, Overlay
from engine.nested.enlightened import current_evmcs, enable_evmcs
from engine.nested.entry_checks import ENTRY_CHECKS, checks_of
from engine.nested.get_state import GetResult, get_nested_state, max_state_size, read_nested_state
from engine.nested.ioctls import Call, check_extension, enable_cap, ioctl
from engine.nested.operations import RunResult, prepare_run, reset, set_cpuid, set_msr, set_smm
from engine.nested.set_state import STEPS, explain_nested_state, set_nested_state, steps_of
from engine.nested.transitions import exit_to_l1, leave_nested
from engine.nested.verdict import CheckReport, SetResult
from engine.nested.vm_entry import InstructionResult, vm_entry, vmclear, vmptrld, vmptrst, vmxoff, vmxon
from engine.vcpu.cpuid import entries_from_json, entries_to_json, supported_cpuid
from engine.vcpu.eras import ERAS, Era, era_of
from engine.vcpu.hv_cpuid import evmcs_version, supported_hv_cpuid, system_hv_cpuid
from engine.vcpu.msrs import read_msr, write_msr
from engine.vcpu.vcpu import NestedHost, NestedVcpu, SvmState, VmxState

__all__ = [
    "ENTRY_CHECKS",
    "ERAS",
    "STEPS",
    "Call",
    "CheckReport",
    "Era",
    "GetResult",
    "GuestMemory",
    "InstructionResult",
    "NestedHost",
    "NestedVcpu",
    "NoMemory",
    "Overlay",
    "Reply",
    "RunResult",
    "SetResult",
    "SvmState",
    "UserBuffer",
    "UserMemory",
    "VmxState",
    "check_extension",
    "checks_of",
    "current_evmcs",
    "enable_cap",
    "enable_evmcs",
    "entries_from_json",
    "entries_to_json",
    "era_of",
    "evmcs_version",
    "exit_to_l1",
    "explain_nested_state",
    "get_nested_state",
    "ioctl",
    "leave_nested",
    "max_state_size",
    "prepare_run",
    "read_msr",
    "read_nested_state",
    "reset",
    "set_cpuid",
    "set_msr",
    "set_nested_state",
    "set_smm",
    "steps_of",
    "supported_cpuid",
    "supported_hv_cpuid",
    "system_hv_cpuid",
    "vm_entry",
    "vmclear",
    "vmptrld",
    "vmptrst",
    "vmxoff",
    "vmxon",
    "write_msr",
]
