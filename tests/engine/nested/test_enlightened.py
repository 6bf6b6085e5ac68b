"""The enlightened VMCS: capability effects, the assist page, attaching, clean bits, restoring."""

from __future__ import annotations

import pytest

from engine.arch.evmcs import EVMCS, EVMCS_FIELDS, EVMCS_PACKED
from engine.arch.vmcs12 import VMCS12
from engine.arch.vmx_msrs import MSR_BY_NAME
from engine.nested import (
    current_evmcs,
    enable_evmcs,
    exit_to_l1,
    leave_nested,
    prepare_run,
    set_msr,
    vm_entry,
    vmclear,
    vmptrld,
    vmptrst,
)
from engine.vcpu.msr_numbers import HV_VP_ASSIST_PAGE
from engine.vcpu.msrs import read_msr
from engine.vcpu.vcpu import Vcpu
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
    NONE,
    RP,
    blob,
    do_get,
    do_set,
    make_vcpu,
    summary,
    vmcs12,
)
from tests.engine.ram import Ram

ASSIST, PAGE, OTHER = 0x8000, 0x9000, 0xA000
CLEAN = 824


def write_evmcs(ram: Ram, gpa: int, era: str, **changes: int) -> None:
    layout = EVMCS_PACKED if era == "kvm-2019" else EVMCS
    page = bytearray(layout.size)
    layout.put(page, "revision_id", 1)
    for name, value in {**MIN32, **changes}.items():
        if name in layout.by_name:
            layout.put(page, name, value)
    ram.write(gpa, bytes(page))


def enlightened(era: str, gpa: int = PAGE, **changes: int) -> tuple[Vcpu, Ram]:
    """In VMX operation, assist page on, enlightened entry asked for."""
    vcpu, ram = make_vcpu(era, evmcs=True, hyperv=True), Ram()
    assert set_msr(vcpu, ram, HV_VP_ASSIST_PAGE, ASSIST | 1)
    ram.put(ASSIST + 40, 1, 1)
    ram.put(ASSIST + 48, gpa)
    write_evmcs(ram, PAGE, era, **changes)
    assert do_set(vcpu, ram, blob(size=128, vmcs12_pa=NONE)).returns == 0
    return vcpu, ram


@pytest.mark.parametrize("era", ERAS)
def test_enabling_is_for_good_and_repeats(era: str) -> None:
    vcpu = make_vcpu(era, vmx=False)
    assert enable_evmcs(vcpu) == 0x0101
    before = vcpu.to_head()
    assert enable_evmcs(vcpu) == 0x0101
    assert vcpu.to_head() == before
    assert vcpu.evmcs_enabled


def test_k10_controls_taken_away_or_filtered() -> None:
    pin, basic_pin = MSR_BY_NAME["IA32_VMX_TRUE_PINBASED_CTLS"], MSR_BY_NAME["IA32_VMX_PINBASED_CTLS"]
    vmfunc, exits = MSR_BY_NAME["IA32_VMX_VMFUNC"], MSR_BY_NAME["IA32_VMX_TRUE_EXIT_CTLS"]
    for era, host_value in (("kvm-2019", 0x3F), ("kvm-latest", 0x7F)):
        vcpu = make_vcpu(era, evmcs=True)
        assert (read_msr(vcpu, pin, host=True) or 0) >> 32 == host_value
        assert (read_msr(vcpu, pin, host=False) or 0) >> 32 == host_value
        visible = make_vcpu(era, evmcs=True, hyperv=True)
        assert (read_msr(visible, pin, host=False) or 0) >> 32 == 0x3F
        assert (read_msr(visible, basic_pin, host=False) or 0) >> 32 == 0x3F
        assert read_msr(visible, vmfunc, host=False) == 0
    latest = make_vcpu("kvm-latest", evmcs=True, hyperv=True)
    assert read_msr(latest, vmfunc, host=True) == 1
    assert not (read_msr(latest, exits, host=False) or 0) >> 32 & 0x1000


@pytest.mark.parametrize("era", ERAS)
def test_assist_page(era: str) -> None:
    vcpu, ram = enlightened(era)
    assert current_evmcs(vcpu, ram) == PAGE
    ram.put(ASSIST + 40, 0, 1)
    assert current_evmcs(vcpu, ram) is None
    ram.put(ASSIST + 41, 1, 1)
    assert current_evmcs(vcpu, ram) == (PAGE if era == "kvm-2019" else None)
    ram.put(ASSIST + 40, 1, 1)
    ram.put(ASSIST + 48, NONE)
    assert current_evmcs(vcpu, ram) == (NONE if era == "kvm-2019" else None)
    assert set_msr(vcpu, ram, HV_VP_ASSIST_PAGE, ASSIST)
    assert current_evmcs(vcpu, ram) is None


def test_enabling_the_assist_page_clears_only_the_apic_part() -> None:
    vcpu, ram = make_vcpu("kvm-2019"), Ram()
    ram.put(ASSIST, 0x1122_3344_5566_7788)
    assert set_msr(vcpu, ram, HV_VP_ASSIST_PAGE, ASSIST | 1)
    assert ram.word(ASSIST) == 0x1122_3344_0000_0000
    assert not set_msr(vcpu, ram, HV_VP_ASSIST_PAGE, 1 << 40 | 1)
    assert vcpu.msrs[HV_VP_ASSIST_PAGE] == ASSIST | 1


@pytest.mark.parametrize("era", ERAS)
def test_attach_enter_exit(era: str) -> None:
    vcpu, ram = enlightened(era, guest_rip=0x1234, hv_clean_fields=0xFFFF)
    result = vm_entry(vcpu, ram)
    assert (result.result, vcpu.vmx.evmptr, vcpu.vmx.current_pa) == ("entered", PAGE, NONE)
    assert vcpu.registers["rip"] == 0x1234
    assert summary(vcpu, ram) == (4224, GM + RP + EV, 0x1000, NONE, 0, 0)
    # Today the clean bits are set once L2's state is prepared, in 2019 when vmcs12 is copied back.
    assert ram.word(PAGE + CLEAN, 4) == (0 if era == "kvm-2019" else 0xFFFF)
    prepare_run(vcpu, ram)
    vcpu.registers["rip"] = 0x1236
    exit_to_l1(vcpu, ram, 18, 0x55)
    layout = vcpu.kvm.nested.evmcs
    page = bytes(ram.bytes[PAGE : PAGE + layout.size])
    fields = ("guest_rip", "vm_exit_reason", "exit_qualification", "hv_clean_fields")
    assert [layout.get(page, name) for name in fields] == [0x1236, 18, 0x55, 0xFFFF]
    assert summary(vcpu, ram) == (4224, EV, 0x1000, NONE, 0, 0)


@pytest.mark.parametrize("era", ERAS)
def test_clean_fields_are_honoured_on_resume_and_not_on_launch(era: str) -> None:
    vcpu, ram = enlightened(era)
    assert vm_entry(vcpu, ram).result == "entered"
    exit_to_l1(vcpu, ram, 18)
    layout = vcpu.kvm.nested.evmcs
    ram.put(PAGE + layout.by_name["guest_rsp"].offset, 0x7000)
    ram.put(PAGE + layout.by_name["guest_rip"].offset, 0x7777)
    assert vm_entry(vcpu, ram, launch=False).result == "entered"
    assert (vcpu.registers["rsp"], vcpu.registers["rip"]) == (0, 0x7777)
    exit_to_l1(vcpu, ram, 18)
    ram.put(PAGE + layout.by_name["guest_rsp"].offset, 0x7000)
    assert vm_entry(vcpu, ram, launch=True).result == "entered"
    assert vcpu.registers["rsp"] == 0x7000


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("revision", "accepted"), [(1, True), (0x11E5_7ED0, True), (2, False), (0xFFFF_FFFF, False)])
def test_revision(era: str, revision: int, accepted: bool) -> None:
    vcpu, ram = enlightened(era, revision_id=revision)
    result = vm_entry(vcpu, ram)
    refused = "retry" if era == "kvm-2019" else "vmfail-invalid"
    assert result.result == ("entered" if accepted else refused)
    assert vcpu.vmx.evmptr == (PAGE if accepted else NONE)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("gpa", [0xDEAD_BEEF, 1 << 45])
def test_unmapped_page(era: str, gpa: int) -> None:
    vcpu, ram = enlightened(era, gpa=gpa)
    result = vm_entry(vcpu, ram)
    assert result.result == ("retry" if era == "kvm-2019" else "#UD")
    assert result.check == "evmcs unmapped"


@pytest.mark.parametrize("era", ERAS)
def test_gpa_zero_is_not_taken_for_attached(era: str) -> None:
    vcpu, ram = enlightened(era, gpa=0)
    assert vm_entry(vcpu, ram).result == ("retry" if era == "kvm-2019" else "vmfail-invalid")
    write_evmcs(ram, 0, era)
    assert vm_entry(vcpu, ram).result == "entered"


@pytest.mark.parametrize("era", ERAS)
def test_low_bits_of_the_gpa_do_not_offset(era: str) -> None:
    vcpu, ram = enlightened(era, gpa=PAGE | 0x10)
    assert vm_entry(vcpu, ram).result == "entered"


@pytest.mark.parametrize("era", ERAS)
def test_vmptr_instructions_while_attached(era: str) -> None:
    vcpu, ram = enlightened(era)
    assert vm_entry(vcpu, ram).result == "entered"
    exit_to_l1(vcpu, ram, 18)
    assert vmptrld(vcpu, ram, 0x2000).result == "retry"
    assert vmptrst(vcpu).result == "retry"
    assert vmclear(vcpu, ram, OTHER).result == "succeed"
    assert vcpu.vmx.evmcs_mapped
    assert vmclear(vcpu, ram, PAGE).result == "succeed"
    assert vcpu.vmx.evmcs_mapped == (era == "kvm-2019")
    ram.put(ASSIST + 40, 0, 1)
    assert vm_entry(vcpu, ram, launch=False).result == ("entered" if era == "kvm-2019" else "vmfail-invalid")


def test_hyperv_in_cpuid_is_needed_only_today() -> None:
    for era in ERAS:
        vcpu, ram = enlightened(era)
        vcpu.cpuid = make_vcpu(era).cpuid
        result = vm_entry(vcpu, ram)
        assert result.result == ("entered" if era == "kvm-2019" else "vmfail-invalid")


def test_packed_layout_reads_bndcfgs_four_bytes_early() -> None:
    vcpu, ram = enlightened("kvm-2019")
    ram.put(PAGE + 892, 0x1111_1111_2222_2222)
    assert vm_entry(vcpu, ram).result == "entered"
    assert VMCS12.get(vcpu.vmx.vmcs12, "guest_bndcfgs") == 0x1111_1111_2222_2222
    vcpu, ram = enlightened("kvm-latest")
    ram.put(PAGE + 896, 0x3333)
    ram.put(PAGE + 976, 0x5)
    assert vm_entry(vcpu, ram).result == "entered"
    assert VMCS12.get(vcpu.vmx.vmcs12, "guest_bndcfgs") == 0x3333
    assert VMCS12.get(vcpu.vmx.vmcs12, "host_ia32_perf_global_ctrl") == 5


def test_restore_maps_the_evmcs_at_the_first_run() -> None:
    for era in ERAS:
        vcpu, ram = enlightened(era)
        data = vmcs12(MIN32, guest_rip=0x4321)
        assert do_set(vcpu, ram, blob(flags=GM + EV, vmcs12_pa=NONE, data=data)).returns == 0
        assert not vcpu.vmx.evmcs_mapped
        ram.put(PAGE + CLEAN, 0xFFFF, 4)
        assert prepare_run(vcpu, ram).exit is None
        assert vcpu.vmx.evmptr == PAGE
        layout = vcpu.kvm.nested.evmcs
        assert ram.word(PAGE + layout.by_name["guest_rip"].offset) == 0x4321
        assert summary(vcpu, ram) == (4224, GM + EV, 0x1000, NONE, 0, 0)
        assert do_set(vcpu, ram, bytes(do_get(vcpu, ram)[1][:4224])).returns == 0


def test_restore_that_cannot_map() -> None:
    for era in ERAS:
        vcpu, ram = enlightened(era)
        assert do_set(vcpu, ram, blob(flags=EV, vmcs12_pa=NONE)).returns == 0
        ram.put(PAGE, 99, 4)
        outcome = prepare_run(vcpu, ram)
        assert (outcome.exit, outcome.suberror) == ((None, None) if era == "kvm-2019" else ("internal-error", 1))
        vcpu, ram = enlightened(era)
        assert do_set(vcpu, ram, blob(flags=EV, vmcs12_pa=NONE)).returns == 0
        ram.put(ASSIST + 40, 0, 1)
        assert prepare_run(vcpu, ram).exit is None
        assert summary(vcpu, ram) == (128, 0, 0x1000, NONE, 0, 0)


def test_pending_map_without_hyperv_stays_pending() -> None:
    vcpu, ram = make_vcpu("kvm-latest", evmcs=True), Ram()
    assert do_set(vcpu, ram, blob(flags=EV, vmcs12_pa=NONE)).returns == 0
    assert prepare_run(vcpu, ram).exit is None
    assert summary(vcpu, ram) == (4224, EV, 0x1000, NONE, 0, 0)


def test_a_forced_exit_maps_a_pending_evmcs_today() -> None:
    vcpu, ram = enlightened("kvm-latest")
    assert do_set(vcpu, ram, blob(flags=GM + EV, vmcs12_pa=NONE, data=vmcs12(MIN32))).returns == 0
    ram.put(PAGE + CLEAN, 0xABFF, 4)
    leave_nested(vcpu, ram)
    assert ram.word(PAGE + CLEAN, 4) == 0
    assert summary(vcpu, ram) == (128, 0, NONE, NONE, 0, 0)


def test_vmfail_reaches_the_evmcs_today() -> None:
    vcpu, ram = enlightened("kvm-latest", pin_based_vm_exec_control=0)
    result = vm_entry(vcpu, ram)
    assert (result.result, result.vm_instruction_error, result.check) == ("vmfail-valid", 7, "ctl:pin")
    assert ram.word(PAGE + EVMCS.by_name["vm_instruction_error"].offset, 4) == 7


@pytest.mark.parametrize("era", ERAS)
def test_every_copied_field_arrives(era: str) -> None:
    from engine.nested import enlightened as module

    vcpu, ram = enlightened(era)
    pattern = bytes((7 * n + 3) & 0xFF for n in range(1024))
    ram.write(PAGE, pattern)
    vcpu.vmx.evmptr = PAGE
    module.copy_in(vcpu, ram, 0)
    for field in vcpu.kvm.nested.evmcs_fields:
        if not vcpu.kvm.nested.copies_in.isdisjoint(field.copies):
            twin = VMCS12.by_name[field.name]
            assert vcpu.vmx.vmcs12[twin.offset : twin.end] == pattern[field.offset : field.offset + field.size]
    module.copy_in(vcpu, ram, 0xFFFF)
    ram.write(PAGE, bytes(4096))
    module.copy_out(vcpu, ram)
    for field in vcpu.kvm.nested.evmcs_fields:
        written = any(ram.bytes[PAGE + field.offset : PAGE + field.offset + field.size])
        assert written == ("O" in field.copies and (field.copies != "O")) or field.name == "hv_clean_fields"
    assert len(EVMCS_FIELDS) == 149
