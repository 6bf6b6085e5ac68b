"""Every printed SET vector, in both kernels: return value, deciding check, what GET says afterwards."""

from __future__ import annotations

import pytest

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.nested import set_msr
from engine.vcpu.registers import RESET_REGISTERS
from engine.vcpu.vcpu import Vcpu
from tests.engine.nested.set_vectors import EMPTY, IN_L1, L2, OFF, RAM_SHADOW, VECTORS, Vector
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
    MINUS,
    NONE,
    RP,
    SHADOW_WORD,
    SHADOWING,
    blob,
    do_get,
    do_set,
    make_vcpu,
    summary,
    vmcs12,
    vmx_cpuid,
)
from tests.engine.ram import Ram


def build(vector: Vector, era: str) -> tuple[Vcpu, Ram]:
    vcpu = make_vcpu(era, **vector.vcpu)
    ram = Ram(words=vector.ram)
    for fields in vector.prior:
        assert do_set(vcpu, ram, blob(**fields)).returns == 0
    return vcpu, ram


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_vector(vector: Vector, era: str) -> None:
    vcpu, ram = build(vector, era)
    result = do_set(vcpu, ram, None if vector.blob is None else blob(**vector.blob))
    expected = vector.of(era, vector.returns)
    if isinstance(expected, str):
        assert (result.returns, result.errno) == (-1, expected)
    else:
        assert (result.returns, result.errno) == (expected, None)
    assert result.label == vector.of(era, vector.check)
    assert summary(vcpu, ram) == vector.of(era, vector.after)


@pytest.mark.parametrize("era", ERAS)
def test_the_deadline_is_the_one_given_or_computed(era: str) -> None:
    if era == "kvm-2019":
        return
    for given, expected in (({"hdr_flags": 1, "deadline": 0x1234}, 0x1234), ({}, 77)):
        vcpu, ram = make_vcpu(era), Ram()
        data = vmcs12(MIN32, pin_based_vm_exec_control=0x56, vmx_preemption_timer_value=77)
        assert do_set(vcpu, ram, blob(flags=GM, data=data, **given)).returns == 0
        _, got = do_get(vcpu, ram)
        assert int.from_bytes(got[32:40], "little") == expected


@pytest.mark.parametrize("era", ERAS)
def test_s01_evmcs_survives_get_and_set_only_today(era: str) -> None:
    vcpu, ram = make_vcpu(era, evmcs=True), Ram()
    first = blob(flags=GM + EV, vmcs12_pa=NONE, data=vmcs12(MIN32))
    assert do_set(vcpu, ram, first).returns == 0
    _, got = do_get(vcpu, ram)
    again = do_set(vcpu, ram, bytes(got[:4224]))
    if era == "kvm-2019":
        assert (again.errno, again.check) == ("EINVAL", "V14")
    else:
        assert again.returns == 0
        assert summary(vcpu, ram) == (4224, GM + EV, 0x1000, NONE, 0, 0)


@pytest.mark.parametrize("era", ERAS)
def test_s02_a_short_blob_loses_the_requested_vmcs12(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    result = do_set(vcpu, ram, blob(size=128))
    assert result.errno == (None if era == "kvm-2019" else "EINVAL")
    assert summary(vcpu, ram) == EMPTY


@pytest.mark.parametrize("era", ERAS)
def test_s04_a_real_vmcs12_makes_evmcs_irrelevant(era: str) -> None:
    vcpu, ram = make_vcpu(era, evmcs=True), Ram()
    assert do_set(vcpu, ram, blob(**L2)).returns == 0
    assert do_set(vcpu, ram, blob(flags=EV)).returns == 0
    assert summary(vcpu, ram) == IN_L1


@pytest.mark.parametrize("era", ERAS)
def test_s05_clearing_feature_control_leaves_nested_mode(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    assert do_set(vcpu, ram, blob(size=1126)).returns == 0
    assert set_msr(vcpu, ram, 0x3A, 0)
    assert summary(vcpu, ram) == OFF


def test_s08_the_old_selftest_fails_on_a_kernel_that_checks_evmcs_first() -> None:
    vcpu = make_vcpu("kvm-2019")
    assert do_set(vcpu, Ram(), blob(**MINUS, flags=EV)).errno == "EINVAL"


@pytest.mark.parametrize("era", ERAS)
def test_allocation_failure_leaves_nothing(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    assert do_set(vcpu, ram, blob()).returns == 0
    vcpu.fail_allocation = True
    result = do_set(vcpu, ram, blob())
    assert (result.returns, result.errno, result.check) == (-1, "ENOMEM", "V11")
    assert summary(vcpu, ram) == OFF
    assert do_set(vcpu, ram, blob()).returns == 0


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("evmcs", [False, True])
def test_a_blob_that_faults_after_leaving_keeps_the_half_set_state(era: str, evmcs: bool) -> None:
    vcpu, ram = make_vcpu(era, evmcs=True), Ram()
    fields = {"flags": EV, "vmcs12_pa": NONE} if evmcs else {}
    for data, check, errno in ((b"", "V16", "EFAULT"), (bytes(4096), "V17", "EINVAL")):
        result = do_set(vcpu, ram, blob(**fields, data=data))
        assert (result.check, result.errno) == (check, errno)
        if not evmcs:
            assert summary(vcpu, ram) == IN_L1
        else:
            late = (4224, EV, 0x1000, NONE, 0, 0)
            assert summary(vcpu, ram) == (EMPTY if era == "kvm-2019" else late)


@pytest.mark.parametrize("era", ERAS)
def test_missing_shadow_bytes_fault_and_forget_the_pending_run(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram(words=RAM_SHADOW)
    result = do_set(vcpu, ram, blob(flags=GM + RP, size=8320, data=vmcs12(SHADOWING), shadow=bytes(100)))
    assert (result.label, result.errno) == ("V20b shadow copy", "EFAULT")
    assert not vcpu.vmx.run_pending
    assert summary(vcpu, ram) == IN_L1


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("reach", [0, 1, 100, 997])
def test_what_comes_before_a_fault_has_been_copied(era: str, reach: int) -> None:
    """A vmcs12, and a shadow vmcs12, whose bytes end before they are whole: copy_from_user copies up to the fault."""
    vcpu, ram = make_vcpu(era), Ram(words=RAM_SHADOW)
    whole = vmcs12(SHADOWING, guest_rip=0x1234)
    assert do_set(vcpu, ram, blob(data=whole[:reach])).label == "V16"
    assert bytes(vcpu.vmx.vmcs12) == whole[:reach].ljust(4096, b"\0")
    shadow = vmcs12(revision=SHADOW_WORD, guest_rip=0x77)
    result = do_set(vcpu, ram, blob(flags=GM, size=8320, data=whole, shadow=shadow[:reach]))
    assert result.label == "V20b shadow copy"
    assert bytes(vcpu.vmx.vmcs12) == whole
    assert bytes(vcpu.vmx.shadow) == shadow[:reach].ljust(4096, b"\0")


def test_the_deadline_is_noted_before_the_shadow_header_is_judged_only_today() -> None:
    for era in ERAS:
        vcpu, ram = make_vcpu(era), Ram(words=RAM_SHADOW)
        result = do_set(
            vcpu, ram, blob(flags=GM, size=8320, hdr_flags=1, deadline=9, data=vmcs12(SHADOWING), shadow=vmcs12())
        )
        assert result.check == "V20c"
        assert vcpu.vmx.deadline == (None if era == "kvm-2019" else 9)


@pytest.mark.parametrize("era", ERAS)
def test_leaving_l2_loads_the_host_state_and_writes_the_shadow_back(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram(words=RAM_SHADOW)
    data = vmcs12(SHADOWING, host_rip=0x1234, host_rsp=0x9000, host_cr3=0x7000, guest_rip=0x4444)
    shadow = vmcs12(revision=SHADOW_WORD, guest_rip=0x77)
    assert do_set(vcpu, ram, blob(flags=GM, size=8320, data=data, shadow=shadow)).returns == 0
    assert vcpu.registers["rip"] == 0x4444
    assert do_set(vcpu, ram, blob(**MINUS)).returns == 0
    assert [vcpu.registers[name] for name in ("rip", "rsp", "cr3", "rflags")] == [0x1234, 0x9000, 0x7000, 2]
    assert ram.read(0x5000, 4096) == shadow


@pytest.mark.parametrize("era", ERAS)
def test_a_failed_entry_leaves_l2_control_registers_behind(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    data = vmcs12(MIN32, guest_cr3=1 << 39, guest_rflags=0x202, guest_rip=0x4444)
    assert do_set(vcpu, ram, blob(flags=GM, data=data)).returns > 0
    assert vcpu.registers["cr0"] == 0x8000_0021
    assert vcpu.registers["rflags"] == 0x202
    assert vcpu.registers["rip"] == RESET_REGISTERS["rip"]


@pytest.mark.parametrize("era", ERAS)
def test_pdptes_are_loaded_by_set_only_in_2019(era: str) -> None:
    pae = {**MIN32, "guest_cr4": 0x2020, "guest_cr3": 0x6000}
    for entry, refused in ((0, False), (1, False), (0x1E7, True), (1 << 40 | 1, True)):
        vcpu, ram = make_vcpu(era), Ram()
        ram.put(0x6008, entry)
        result = do_set(vcpu, ram, blob(flags=GM, data=vmcs12(pae)))
        assert result.label == ("V22 pdpte" if refused and era == "kvm-2019" else "V23")


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    ("fields", "before", "label_2019"),
    [
        ({}, 1 << 39, "V23"),  # L2 has the CR3 that L1 has: nothing changes, nothing is looked at
        ({}, 1 << 39 | 0x1000, "V22 cr3"),
        ({"guest_cr4": 0x2020}, 1 << 39, "V22 cr3"),  # page-directory pointers are to be loaded from there
    ],
)
def test_an_unchanged_cr3_is_not_looked_at_in_2019(
    era: str, fields: dict[str, int], before: int, label_2019: str
) -> None:
    vcpu = make_vcpu(era)
    vcpu.registers["cr3"] = before
    result = do_set(vcpu, Ram(), blob(flags=GM, data=vmcs12({**MIN32, **fields}, guest_cr3=1 << 39)))
    assert result.label == (label_2019 if era == "kvm-2019" else "V22 cr3")


@pytest.mark.parametrize("era", ERAS)
def test_smm_guest_mode_is_never_cleared(era: str) -> None:
    vcpu, ram = make_vcpu(era, smm=True), Ram()
    assert do_set(vcpu, ram, blob(smm=3)).returns == 0
    assert do_set(vcpu, ram, blob()).returns == 0
    assert summary(vcpu, ram) == (4224, 0, 0x1000, 0x2000, 1, 0)


def test_vmx_in_cpuid_is_what_allows() -> None:
    vcpu = Vcpu(cpuid=vmx_cpuid(vmx=False))
    assert not vcpu.vmx_allowed
    assert make_vcpu("kvm-2019").vmx_allowed
    assert Vcpu().maxphyaddr == 36


@pytest.mark.parametrize("era", ERAS)
def test_the_width_is_that_of_a_leaf_to_which_the_highest_leads(era: str) -> None:
    own = CpuidEntry(0x8000_0008, eax=39)
    for highest, width in ((None, 36), (0x8000_0007, 36), (0x8000_0008, 39), (0x8000_001F, 39)):
        rest = tuple(entry for entry in vmx_cpuid() if entry.function not in (0x8000_0000, 0x8000_0008))
        told = () if highest is None else (CpuidEntry(0x8000_0000, eax=highest),)
        vcpu = make_vcpu(era, cpuid=(*rest, *told, own))
        assert vcpu.maxphyaddr == width
        result = do_set(vcpu, Ram(), blob(vmxon=1 << 36))
        assert result.errno == (None if width == 39 else "EINVAL")
    bare = make_vcpu(era, cpuid=(CpuidEntry(0x8000_0000, eax=0x8000_0008),))
    assert bare.maxphyaddr == 36
