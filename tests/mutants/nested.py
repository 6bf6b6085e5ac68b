"""Faults of ``engine/nested`` and of what a machine makes of it."""

from __future__ import annotations

from .mutant import Mutant
from .paths import named

SET_PY = "engine/nested/set_state.py"
GET_PY = "engine/nested/get_state.py"
CONTEXT_PY = "engine/nested/entry_context.py"
CAPABILITIES_PY = "engine/vcpu/vmx_capabilities.py"
REGISTERS_PY = "engine/ioctls/registers.py"
MSRS_PY = "engine/ioctls/msrs.py"
STATES_PY = "engine/machine/nested_states.py"
REPLAY_PY = "engine/trace/replay.py"

NESTED = "tests/engine/nested"
OPERATIONS = "tests/engine/machine/test_nested_operations.py"
REGISTER_IOCTLS = "tests/engine/ioctls/test_register_ioctls.py"


def vectors(*rows: str) -> tuple[str, ...]:
    """Rows of the printed SET vectors."""
    return tuple(f"{NESTED}/test_set_vectors.py::test_vector[{row}]" for row in rows)


MUTANTS = (
    Mutant(
        "nested-short-2019",
        SET_PY,
        "return Verdict() if c.size < abi.MIN_SIZE_VMCS12 else None",
        "return Verdict() if c.size <= abi.MIN_SIZE_VMCS12 else None",
        "1126 bytes have a vmcs12",
        vectors("D06-kvm-2019"),
    ),
    Mutant(
        "nested-short-latest",
        SET_PY,
        "if c.size >= abi.MIN_SIZE_VMCS12:",
        "if c.size > abi.MIN_SIZE_VMCS12:",
        "1126 bytes have a vmcs12",
        vectors("D06-kvm-latest"),
    ),
    Mutant(
        "nested-same-cr3",
        "engine/nested/entry_checks.py",
        'if cr3 >> vcpu.maxphyaddr and (pdptes or not rows.keeps_same_cr3 or cr3 != vcpu.registers["cr3"]):',
        "if cr3 >> vcpu.maxphyaddr:",
        "the kernel of 2019 does not look at a CR3 that does not change",
        (f"{NESTED}/test_set_vectors.py::test_an_unchanged_cr3_is_not_looked_at_in_2019",),
    ),
    Mutant(
        "nested-same-page",
        SET_PY,
        "if c.vmcs12_pa == c.vmxon_pa or not c.vcpu.page_valid(c.vmcs12_pa):",
        "if not c.vcpu.page_valid(c.vmcs12_pa):",
        "VMXON region and VMCS are different pages",
        vectors("E01-kvm-2019", "E01-kvm-latest"),
    ),
    Mutant(
        "nested-evmcs-flag",
        SET_PY,
        "return bool(c.flags & abi.EVMCS) and not (c.vcpu.vmx_allowed and c.vcpu.evmcs_enabled)",
        "return bool(c.flags & abi.EVMCS) and not (c.vcpu.vmx_allowed or c.vcpu.evmcs_enabled)",
        "EVMCS needs VMX and the capability",
        vectors("B04-kvm-2019", "E07-kvm-latest"),
    ),
    Mutant(
        "nested-shadow-size",
        SET_PY,
        "short = c.shadow_in_use and c.size < abi.MIN_SIZE_SHADOW",
        "short = c.shadow_in_use and c.size < abi.MIN_SIZE_SHADOW - 1",
        "5222 bytes have a shadow vmcs12",
        vectors("H12-kvm-2019"),
    ),
    Mutant(
        "nested-revision-bit-31",
        CONTEXT_PY,
        "return word & REVISION_MASK == VMCS12_REVISION",
        "return word == VMCS12_REVISION",
        "the revision has 31 bits",
        vectors("F02-kvm-2019"),
    ),
    Mutant(
        "nested-must-be-1",
        CAPABILITIES_PY,
        "return (value & may1 | must1) == value",
        "return value & may1 == value",
        "bits that must be 1 are",
        vectors("H01-kvm-2019"),
    ),
    Mutant(
        "nested-get-evmcs",
        GET_PY,
        "flags |= abi.EVMCS if _evmcs_reported(vcpu) else 0",
        "flags |= abi.EVMCS if vcpu.evmcs_enabled else 0",
        "GET says EVMCS when one is in use, not when it may be",
        vectors("E05-kvm-2019"),
    ),
    Mutant(
        "nested-count-allocation",
        SET_PY,
        "c.vcpu.allocations += 1",
        "pass",
        "entering VMX operation is an allocation",
        named(OPERATIONS, "the_allocation_that_fails_is_counted"),
    ),
    Mutant(
        "nested-page-not-freed",
        STATES_PY,
        "frames.free_frame(machine, frame)",
        "pass",
        "a page of zeros takes no frame",
        named(OPERATIONS, "state_survives_the_durable_form"),
    ),
    Mutant(
        "nested-partition",
        STATES_PY,
        "partition={number: vcpu.msrs[number] for number in PARTITION_MSRS if number in vcpu.msrs},",
        "partition=states.partition,",
        "GUEST_OS_ID and HYPERCALL belong to all vCPUs",
        named(OPERATIONS, "partition_msrs_are_the_same_on_every_vcpu"),
    ),
    Mutant(
        "nested-half-a-copy-is-none",
        "engine/abi/user_memory.py",
        'target[:size] = found.ljust(size, b"\\0")',
        "target[:size] = found if len(found) == size else target[:size]",
        "copy_from_user copies what comes before a fault (Linux, lib/usercopy.c)",
        named(f"{NESTED}/test_set_vectors.py", "what_comes_before_a_fault_has_been_copied"),
    ),
    Mutant(
        "nested-cpl",
        STATES_PY,
        'frames.write_word(draft.machine, frame, ctl.V_CPL, (vcpu.registers["ss_ar_bytes"] & _DPL) >> 5)',
        "pass",
        "CPL is the DPL of SS",
        named(OPERATIONS, "registers_are_those_of_the_vcpu_record"),
    ),
    Mutant(
        "nested-unenforced-l1",
        REPLAY_PY,
        "if not read_word(m, FIRST_VCPU_FRAME + vcpu, V_GUEST_MODE) or not read_word(m, STATE_FRAME, reg.SPP_ACTIVE):",
        "if not read_word(m, STATE_FRAME, reg.SPP_ACTIVE):",
        "only L2 goes past sub-page protection",
        named(OPERATIONS, "writes_of_l2_go_past_sub_page_protection_in_2019"),
    ),
    Mutant(
        "nested-sregs-pae",
        REGISTERS_PY,
        "if not cr4 & CR4_PAE or not efer & vmx.EFER_LMA:",
        "if not efer & vmx.EFER_LMA:",
        "long mode needs PAE",
        named(REGISTER_IOCTLS, "sregs_that_cannot_be_together"),
    ),
    Mutant(
        "nested-events-flag",
        REGISTERS_PY,
        "if flags & abi.EVENT_SMM:",
        "if not flags or flags & abi.EVENT_SMM:",
        "SMM changes when its flag says so",
        named(REGISTER_IOCTLS, "events"),
    ),
    Mutant(
        "nested-unknown-msr",
        MSRS_PY,
        "if number not in KNOWN_MSRS or not set_msr(vcpu, memory, number, value):",
        "if not set_msr(vcpu, memory, number, value):",
        "MSRs that the kernel does not know are refused",
        named(REGISTER_IOCTLS, "msrs_stop_at_the_first_that_is_not_known"),
    ),
)
