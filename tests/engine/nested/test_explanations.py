"""Every check of a nested state names what it looked at, what it found there and what it takes."""

from __future__ import annotations

from typing import Any

import pytest

from engine.abi import UserBuffer
from engine.nested import SetResult, explain_nested_state, steps_of
from engine.nested.entry_checks import checks_of
from engine.nested.set_facts import FACTS
from engine.vcpu.vcpu import Vcpu, VcpuHost
from tests.engine.nested.entry_check_cases import CASES
from tests.engine.nested.set_vectors import VECTORS
from tests.engine.nested.support import (
    ERAS,
    GIF,
    GM,
    MIN32,
    MINUS,
    NONE,
    SHADOW_WORD,
    SHADOWING,
    blob,
    make_vcpu,
    vmcs12,
)
from tests.engine.nested.svm import svm_blob, vcpu_with_svm, vmcb
from tests.engine.ram import Ram

OLD, NEW = ERAS
SHADOWED: dict[str, Any] = {"flags": GM, "data": vmcs12(SHADOWING)}


def printed(name: str) -> tuple[dict[str, Any], bytes | None]:
    """What the vCPU has and the blob of a printed vector."""
    (vector,) = (vector for vector in VECTORS if vector.id == name)
    return vector.vcpu, None if vector.blob is None else blob(**vector.blob)


# Check, what the vCPU has, the blob that trips it, the field, what is found.
TRIPPED: list[tuple[str, dict[str, Any], bytes | None, str, str]] = [
    ("G0", *printed("C06"), "host", "nested=false on intel"),
    ("G1", *printed("A01"), "data", "NULL"),
    ("G1", {}, bytes(7), "data", "7 bytes"),
    ("G2", {}, blob(size=127), "size", "0x7f"),
    ("G3", *printed("A10"), "flags", "0x10"),
    ("G4", *printed("A07"), "flags", "0x2"),
    ("V1", *printed("A11"), "format", "0x1"),
    ("V2a", *printed("B08"), "vmx.smm_flags", "0x1"),
    ("V2b", *printed("B07"), "vmx.vmcs12_pa", "0x2000"),
    ("V2c", {}, blob(**MINUS, flags=GM), "flags", "0x1"),
    ("V3a", {"cpuid": ()}, blob(), "vmx.vmxon_pa", "0x1000"),
    ("V3b", *printed("C01"), "vmx.vmxon_pa", "0x1"),
    ("V4", {}, blob(flags=GM, smm=1), "vmx.smm_flags", "0x1"),
    ("V5", {}, blob(smm=4), "vmx.smm_flags", "0x4"),
    ("V5n", {}, blob(hdr_flags=2), "vmx.flags", "0x2"),
    ("V6", *printed("G02"), "vmx.smm_flags", "0x2"),
    ("V6", {"smm": True}, blob(flags=GM), "flags", "0x1"),
    ("V7", *printed("G08"), "vmx.smm_flags", "0x1"),
    ("V8", *printed("E07"), "flags", "0x4"),
    ("V10", {}, blob(**MINUS), "vmx.vmxon_pa", f"{NONE:#x}"),
    ("V11", {"fail_allocation": True}, blob(), "host.fail_allocation", "an allocation"),
    ("V12", *printed("D02"), "size", "0x80"),
    ("V12n", *printed("D02"), "size", "0x80"),
    ("V13", {}, blob(vmcs12_pa=0x1000), "vmx.vmcs12_pa", "0x1000"),
    ("V14", {}, blob(vmcs12_pa=NONE), "flags", "0x0"),
    ("V16", {}, blob()[:200], "data", "200 bytes"),
    ("V17", *printed("F03"), "vmcs12.revision", "0x11e57ed1"),
    ("V18", {}, blob(), "flags", "0x0"),
    ("V20a", *printed("H09"), "size", "0x1080"),
    ("V20b", {}, blob(**SHADOWED, size=8320)[:4224], "data", "4224 bytes"),
    ("V20c", {}, blob(**SHADOWED, size=8320, shadow=vmcs12(revision=5)), "shadow_vmcs12.revision", "0x5"),
    ("V22", {}, blob(flags=GM, data=vmcs12(MIN32, guest_cr3=1 << 60)), "vmcs12.guest_cr3", "0x1000000000000000"),
]


def explained(vcpu: Vcpu, data: bytes | None, ram: Ram | None = None) -> SetResult:
    """What the call would do; what decides has all three members, and so has every row that is more than an effect."""
    result, _ = explain_nested_state(vcpu, ram or Ram(words={0x5000: SHADOW_WORD}), UserBuffer.of(data))
    effects = {step.check for step in steps_of(vcpu.profile, vcpu.host.vendor) if step.effect and step.check != "V11"}
    for row in result.trail:
        if row.check not in effects | {"V21", "V23"}:
            assert row.field and row.required, row
            assert bool(row.found) == (row.outcome != "not reached"), row
        if row.outcome != "decides" and row.required:
            assert row.says == f"needs {row.required}" or row.check in effects | {"V11"}, (
                "a pass is told by what it needs"
            )
    for row in result.parts:
        assert row.field and row.required and bool(row.found) == (row.outcome != "not reached"), row
    return result


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("check", "has", "data", "field", "found"), TRIPPED, ids=[row[0] for row in TRIPPED])
def test_each_step(era: str, check: str, has: dict[str, Any], data: bytes | None, field: str, found: str) -> None:
    absent = {OLD: ("V5n", "V12n"), NEW: ("G0", "V12")}[era]
    if check in absent:
        assert check not in [step.check for step in steps_of(era)] or check == "G0"
        return
    result = explained(make_vcpu(era, **has), data)
    assert result.check == check
    assert (result.field, result.found) == (field, found)
    assert result.required and result.required != found


def test_every_step_is_tripped() -> None:
    steps = {step.check for era in ERAS for step in steps_of(era) if not step.effect or step.check == "V11"}
    assert steps - {"V21", "V23"} == set(FACTS) == {row[0] for row in TRIPPED}


@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(CASES)])
def test_each_entry_check(name: str, changes: dict[str, int]) -> None:
    for era in ERAS:
        if name in [check.name for check in checks_of(era)]:
            result = explained(make_vcpu(era), blob(flags=GM, data=vmcs12(MIN32, **changes)))
            if result.check == "V21":
                assert result.field is not None and result.field.startswith("vmcs12.")
                assert result.found == f"{vmcs12_value(result.field, changes):#x}"


def vmcs12_value(field: str, changes: dict[str, int]) -> int:
    return {**MIN32, **changes}.get(field.removeprefix("vmcs12."), 0)


def test_a_control_says_which_bits() -> None:
    result = explained(make_vcpu(OLD), blob(flags=GM, data=vmcs12(MIN32, pin_based_vm_exec_control=0)))
    assert (result.label, result.field, result.found) == ("V21 ctl:pin", "vmcs12.pin_based_vm_exec_control", "0x0")
    assert result.required is not None and result.required.endswith("every bit of 0x16, and none outside 0x7f")


@pytest.mark.parametrize(
    ("check", "registers", "smm", "data", "field", "found"),
    [
        ("S1", {}, False, blob(flags=0), "format", "0x0"),
        ("S2", {}, False, svm_blob(8, b""), "flags", "0x8"),
        ("S3", {"ia32_efer": 0}, False, svm_blob(GM, b""), "flags", "0x1"),
        ("S4", {}, True, svm_blob(GM, b""), "flags", "0x1"),
        ("S6", {}, False, blob(format=1, flags=GM, vmxon=3, vmcs12_pa=0), "svm.vmcb_pa", "0x3"),
        ("S7", {}, False, svm_blob(GM | GIF, vmcb(), 4223), "size", "0x107f"),
        ("S8", {}, False, svm_blob(GM, vmcb())[:300], "data", "300 bytes"),
        ("S9", {}, False, svm_blob(GM, vmcb(asid=0)), "vmcb12.asid", "0x0"),
        ("S10", {"cr0": 1 << 29}, False, svm_blob(GM, vmcb()), "registers.cr0", "0x20000000"),
        ("S11", {}, False, svm_blob(GM, vmcb(dr7=1 << 32)), "vmcb12.dr7", "0x100000000"),
        ("S12", {"cr3": 1 << 50}, False, svm_blob(GM, vmcb()), "registers.cr3", "0x4000000000000"),
    ],
)
def test_each_check_of_svm(
    check: str, registers: dict[str, int], smm: bool, data: bytes, field: str, found: str
) -> None:
    vcpu = vcpu_with_svm(smm=smm)
    vcpu.registers.update(registers)
    result = explained(vcpu, data)
    assert (result.check, result.field, result.found) == (check, field, found)
    assert result.required


def test_step_ids_name_one_step_in_each_kernel() -> None:
    for era in ERAS:
        ids = [step.check for step in steps_of(era)]
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("era", ERAS)
def test_explaining_lists_the_entry_checks(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    data = blob(flags=GM, data=vmcs12(MIN32, host_cr0=0))
    result, after = explain_nested_state(vcpu, ram, UserBuffer.of(data))
    outcomes = {part.check: part.outcome for part in result.parts}
    assert outcomes["ctl:pin"] == "pass"
    assert outcomes["host:hostcr"] == "decides"
    assert outcomes["guest:activity"] == "not reached"
    assert result.trail[-3].to_json()["outcome"] == "decides"
    assert after.vmx.vmxon and not vcpu.vmx.vmxon
    assert explain_nested_state(vcpu, ram, UserBuffer.of(blob(vmxon=1)))[0].parts == ()


def test_explaining_on_amd_lists_the_svm_checks() -> None:
    vcpu = Vcpu(profile="kvm-latest", host=VcpuHost(vendor="amd"))
    result, _ = explain_nested_state(vcpu, Ram(), UserBuffer.of(blob(format=1, flags=4)))
    assert [report.check for report in result.trail] == ["G0", "G1", "G2", "G3", "G4", "SVM"]
    assert [part.outcome for part in result.parts] == ["pass", "decides", "not reached", "not reached"]
