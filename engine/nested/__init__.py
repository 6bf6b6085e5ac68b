"""Nested VMX and SVM state and the enlightened VMCS: what KVM keeps for a guest that runs its own guests.

The operations take a vCPU together with the guest's memory and change it in place; ``explain_nested_state`` and
``read_nested_state`` do not.
"""

from engine.nested.enlightened import current_evmcs, enable_evmcs
from engine.nested.entry_checks import ENTRY_CHECKS
from engine.nested.get_state import get_nested_state, max_state_size, read_nested_state
from engine.nested.operations import RunResult, prepare_run, reset, set_cpuid, set_msr, set_smm
from engine.nested.set_state import STEPS, explain_nested_state, set_nested_state, steps_of
from engine.nested.transitions import exit_to_l1, leave_nested
from engine.nested.verdict import SetResult
from engine.nested.vm_entry import InstructionResult, vm_entry, vmclear, vmptrld, vmptrst, vmxoff, vmxon

__all__ = [
    "ENTRY_CHECKS",
    "STEPS",
    "InstructionResult",
    "RunResult",
    "SetResult",
    "current_evmcs",
    "enable_evmcs",
    "exit_to_l1",
    "explain_nested_state",
    "get_nested_state",
    "leave_nested",
    "max_state_size",
    "prepare_run",
    "read_nested_state",
    "reset",
    "set_cpuid",
    "set_msr",
    "set_nested_state",
    "set_smm",
    "steps_of",
    "vm_entry",
    "vmclear",
    "vmptrld",
    "vmptrst",
    "vmxoff",
    "vmxon",
]
