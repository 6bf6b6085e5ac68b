"""Faults of ``engine/vcpu``: what KVM takes for registers and MSRs, and the CPUID that follows them."""

from __future__ import annotations

from .mutant import Mutant
from .paths import named

APIC_BASE_PY = "engine/vcpu/apic_base.py"
CONTROL_REGISTERS_PY = "engine/vcpu/control_registers.py"
CPUID_PY = "engine/vcpu/runtime_cpuid.py"
WIDTH_PY = "engine/vcpu/cpuid.py"
MSRS_PY = "engine/vcpu/msrs.py"
SREGS_PY = "engine/ioctls/registers.py"
SETTINGS_PY = "engine/ioctls/vm_settings.py"
STATES_PY = "engine/machine/nested_states.py"
HYPERV_PY = "engine/machine/hyperv.py"

REGISTER_IOCTLS = "tests/engine/ioctls/test_register_ioctls.py"
HYPERCALLS = "tests/engine/machine/test_hypercall_operations.py"
VM_SETTINGS = "tests/engine/ioctls/test_vm_settings.py"
SET_VECTORS = "tests/engine/nested/test_set_vectors.py"
RUNTIME_CPUID = "tests/engine/vcpu/test_runtime_cpuid.py"

MUTANTS = (
    Mutant(
        "vcpu-x2apic-of-a-dead-apic",
        APIC_BASE_PY,
        "if value & X2APIC and not value & ENABLED:",
        "if value & X2APIC and not (host or value & ENABLED):",
        "x2APIC mode needs an APIC that is on",
        named(REGISTER_IOCTLS, "sregs_that_cannot_be_together", "apic_base_as_an_msr"),
    ),
    Mutant(
        "vcpu-x2apic-left-for-xapic",
        APIC_BASE_PY,
        "return not leaves_x2apic and not (value & X2APIC and not old & ENABLED)",
        "return not (value & X2APIC and not old & ENABLED)",
        "a guest leaves x2APIC mode by switching the APIC off",
        named(REGISTER_IOCTLS, "apic_base_as_an_msr"),
    ),
    Mutant(
        "vcpu-vmxe-in-smm",
        CONTROL_REGISTERS_PY,
        "if value & CR4_VMXE and (not vcpu.vmx_allowed or vcpu.smm):",
        "if value & CR4_VMXE and not vcpu.vmx_allowed:",
        "no CR4.VMXE in SMM",
        named(REGISTER_IOCTLS, "a_cr4_that_vmx_does_not_allow"),
    ),
    Mutant(
        "vcpu-cr4-of-2019",
        SREGS_PY,
        'del given["cr4"]',
        'given["cr4"] &= ~(1 << 13)',
        "a CR4 that 5.3 does not take leaves the whole old one",
        named(REGISTER_IOCTLS, "a_cr4_that_vmx_does_not_allow"),
    ),
    Mutant(
        "vcpu-cr0-of-l2-as-of-l1",
        CONTROL_REGISTERS_PY,
        "return guest_cr0_valid(vcpu, value)",
        'return respects_fixed_bits(vcpu, "cr0", value)',
        "an unrestricted L2 needs neither CR0.PE nor CR0.PG",
        named(REGISTER_IOCTLS, "vmx_operation_fixes_cr0_today"),
    ),
    Mutant(
        "vcpu-cr0-under-vmxon",
        CONTROL_REGISTERS_PY,
        'return not vcpu.vmx.vmxon or respects_fixed_bits(vcpu, "cr0", value)',
        "return True",
        "7.1 wants the fixed bits of CR0 under VMXON",
        named(REGISTER_IOCTLS, "vmx_operation_fixes_cr0_today"),
    ),
    Mutant(
        "vcpu-cr8-cut",
        SREGS_PY,
        'del given["cr8"]',
        'given["cr8"] &= 0xF',
        "a CR8 above 15 leaves the old one",
        named(REGISTER_IOCTLS, "a_cr8_above_15_leaves_the_old_one"),
    ),
    Mutant(
        "vcpu-cpuid-without-leaf-1",
        CPUID_PY,
        "if vcpu.kvm.vcpu.runtime_cpuid_needs_leaf_1 and find_leaf(entries, 1) is None:",
        "if find_leaf(entries, 1) is None:",
        "later kernels look at each leaf by itself",
        named(RUNTIME_CPUID, "2019_needs_leaf_1"),
    ),
    Mutant(
        "vcpu-width-without-the-highest-leaf",
        WIDTH_PY,
        "if highest is None or highest.eax < 0x8000_0008:",
        "if highest is not None and highest.eax < 0x8000_0008:",
        "the width is 36 bits where leaf 0x80000000 is missing",
        named(SET_VECTORS, "the_width_is_that_of_a_leaf_to_which_the_highest_leads"),
    ),
    Mutant(
        "vcpu-cpuid-keeps-osxsave",
        CPUID_PY,
        "return replace(leaf, ecx=leaf.ecx & ~_ECX1_OSXSAVE | osxsave, edx=leaf.edx & ~_EDX1_APIC | apic)",
        "return replace(leaf, ecx=leaf.ecx | osxsave, edx=leaf.edx & ~_EDX1_APIC | apic)",
        "OSXSAVE is CR4's, whatever user space put there",
        named(RUNTIME_CPUID, "flags_are_not_user_space_s"),
    ),
    Mutant(
        "vcpu-feature-control-of-a-guest",
        MSRS_PY,
        "allowed |= vcpu.kvm.vcpu.feature_control_of_host",
        "allowed |= vmx.FEATURE_CONTROL_LOCKED",
        "in 7.1 the host sets what KVM knows, whatever CPUID has",
        named(REGISTER_IOCTLS, "feature_control_without_vmx"),
    ),
    Mutant(
        "vcpu-hwcr-cleared-in-2019",
        MSRS_PY,
        "if value or vcpu.kvm.vcpu.hwcr_clears:",
        "if vcpu.kvm.vcpu.hwcr_bits:",
        "5.3 does not store a 0",
        named(REGISTER_IOCTLS, "hwcr"),
    ),
    Mutant(
        "vcpu-microcode-by-the-guest",
        MSRS_PY,
        "if number == _MICROCODE_REVISION and not host:",
        "if number == 0 and not host:",
        "a guest's write of the revision does nothing",
        named(REGISTER_IOCTLS, "microcode_revision"),
    ),
    Mutant(
        "vcpu-enforced-in-2019",
        HYPERV_PY,
        "if not self.enforcement_available() and (enforced or not self._flag(vcpu, notes.ENFORCE_CPUID)):",
        "if False:",
        "5.3 has no KVM_CAP_HYPERV_ENFORCE_CPUID",
        named(HYPERCALLS, "2019_has_no_enforcement_of_cpuid"),
    ),
    Mutant(
        "vcpu-ids-chosen-twice",
        SETTINGS_PY,
        "if vcpu_ids(target):",
        "if target.vm.config.vcpus:",
        "the limit of vCPU ids is chosen once",
        named(VM_SETTINGS, "the_limit_of_ids_is_chosen_once_and_first"),
    ),
    Mutant(
        "vcpu-pending-beside-injected",
        SREGS_PY,
        'elif vcpu.registers.get("exception_pending", 0) and not vcpu.exception_payload:',
        'elif vcpu.registers.get("exception_pending", 0):',
        "with payloads a pending exception is not an injected one",
        named(VM_SETTINGS, "payloads_of_exceptions"),
    ),
    Mutant(
        "vcpu-settings-forgotten",
        STATES_PY,
        'settings=VmSettings(**_from_text(head.get("settings", {}))),',
        "settings=VmSettings(),",
        "what was chosen for a VM is durable",
        named(VM_SETTINGS, "payloads_of_exceptions", "the_boot_processor"),
    ),
)
