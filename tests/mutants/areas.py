"""Faults of KVM_RUN and of the state that a vCPU keeps: APIC, extended state, XCR0, debug registers, MP state."""

from __future__ import annotations

from .mutant import Mutant
from .paths import named

ROOM = "tests/engine/ioctls"
RUN, AREAS, MP = f"{ROOM}/test_run.py", f"{ROOM}/test_vcpu_areas.py", f"{ROOM}/test_mp_state.py"
MEMORY, STARTUP = f"{ROOM}/test_memory_calls.py", f"{ROOM}/test_selftest_startup.py"
RUN_PY, AREAS_PY = "engine/ioctls/run.py", "engine/ioctls/vcpu_areas.py"
LAPIC_PY, STATE_PY = "engine/vcpu/lapic.py", "engine/vcpu/extended_state.py"

MUTANTS = (
    Mutant(
        "run-uninitialised-waits",
        RUN_PY,
        'return failed("EINTR") if immediate else _interrupted(page)',
        "return _interrupted(page)",
        "immediate_exit leaves exit_reason, also of a vCPU that is not initialised",
        named(RUN, "immediate_exit"),
    ),
    Mutant(
        "run-dirty-bit-stays",
        RUN_PY,
        'page.put("kvm_dirty_regs", dirty & ~bit)',
        "pass",
        "registers that were taken from the page are no longer dirty",
        named(RUN, "registers_in_the_page"),
    ),
    Mutant(
        "run-looks-at-cr8",
        RUN_PY,
        "if not vcpu.lapic_in_kernel:",
        "if True:",
        "cr8 of the page counts without an APIC in the kernel",
        named(RUN, "flags_of_the_page"),
    ),
    Mutant(
        "mp-state-known-in-2019",
        "engine/ioctls/mp_state.py",
        "unknown = rules.mp_states_known and number not in _NAMES",
        "unknown = number not in _NAMES",
        "the kernel of 2019 takes any number",
        named(MP, "a_number_that_is_none"),
    ),
    Mutant(
        "sipi-without-vector",
        "engine/ioctls/mp_state.py",
        '_start(vcpu.registers, vcpu.registers.get("sipi_vector", 0))',
        "pass",
        "a SIPI starts the vCPU at its vector",
        named(MP, "a_sipi_starts_the_vcpu_at_its_vector"),
    ),
    Mutant(
        "lapic-id-free-today",
        LAPIC_PY,
        "own = vcpu.vcpu_id if rules.x2apic_id_fixed else _get(page, ID) >> 24",
        "own = _get(page, ID) >> 24",
        "today the id in x2APIC mode is that of the vCPU",
        named(AREAS, "x2apic"),
    ),
    Mutant(
        "lapic-version-as-set",
        LAPIC_PY,
        "_put(page, VERSION, KVM_VERSION)",
        "pass",
        "the version is KVM's",
        named(AREAS, "an_apic_is_given_back"),
        function="set_state",
    ),
    Mutant(
        "lapic-priority-apart",
        LAPIC_PY,
        'vcpu.registers["cr8"] = _get(page, TASK_PRIORITY) >> 4 & 0xF',
        "pass",
        "CR8 is the task priority",
        named(AREAS, "task_priority_is_cr8"),
    ),
    Mutant(
        "xsave-mxcsr-unchecked",
        STATE_PY,
        "if (present or not today) and mxcsr & ~_MXCSR_MASK[vcpu.host.vendor]:",
        "if present and mxcsr & ~_MXCSR_MASK[vcpu.host.vendor]:",
        "the kernel of 2019 looks at MXCSR always",
        named(AREAS, "extended_state_that_is_refused"),
    ),
    Mutant(
        "xsave-header-unchecked",
        STATE_PY,
        "if present & ~HOST_COMPONENTS or (today and any(raw[HEADER_AT + 8 : AVX_AT])):",
        "if present & ~HOST_COMPONENTS:",
        "today the rest of the header is 0",
        named(AREAS, "extended_state_that_is_refused"),
    ),
    Mutant(
        "xcr0-avx-alone",
        STATE_PY,
        "if not value & X87 or (value & AVX and not value & SSE):",
        "if not value & X87:",
        "AVX goes with SSE",
        named(AREAS, "xcr0"),
    ),
    Mutant(
        "debugregs-wide",
        AREAS_PY,
        'if abi.DEBUGREGS.get(raw, "flags") or given["dr6"] >> 32 or given["dr7"] >> 32:',
        'if abi.DEBUGREGS.get(raw, "flags") or given["dr6"] >> 32:',
        "DR7 has 32 bits",
        named(AREAS, "debug_registers"),
    ),
    Mutant(
        "areas-not-kept",
        "engine/machine/nested_states.py",
        "record_areas.put(draft.machine, frame, vcpu)",
        "pass",
        "what was set is kept with the machine",
        named(AREAS, "an_apic_is_given_back"),
    ),
    Mutant(
        "region2-of-2019",
        "engine/ioctls/user_memory_region.py",
        'Ioctl("KVM_SET_USER_MEMORY_REGION2", VM, set_user_memory_region2, profiles=ONLY_LATEST),',
        'Ioctl("KVM_SET_USER_MEMORY_REGION2", VM, set_user_memory_region2),',
        "the kernel of 2019 does not know the second form",
        named(MEMORY, "2019_does_not_know_it"),
    ),
    Mutant(
        "vcpu-waits-for-nothing",
        "engine/machine/nested_states.py",
        "waits = own.reset and states.lapic_in_kernel and own.id != states.settings.boot_vcpu",
        "waits = False",
        "a further vCPU is not initialised",
        named(MP, "a_further_vcpu_is_not_initialised"),
    ),
)
