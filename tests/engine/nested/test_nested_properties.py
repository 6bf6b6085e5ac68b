"""What holds for any blob: documented errnos and nothing else, state as documented, lossless conversions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch.vmcs12 import VMCS12_REVISION
from engine.nested import explain_nested_state, read_nested_state, steps_of, vm_entry
from engine.vcpu.msr_numbers import HV_VP_ASSIST_PAGE
from engine.vcpu.vcpu import Vcpu
from tests.engine.nested.drawn_blobs import BEFORE_THE_POINT_OF_NO_RETURN, blobs, patches
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
    MIN64,
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
)
from tests.engine.ram import Ram

ERRNOS = {"EINVAL", "EFAULT", None}

SIZES = [0, 127, 128, 1125, 1126, 4224, 5221, 5222, 8320, 0xFFFF_FFFF]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Vcpu, Ram]:
    vcpu = make_vcpu(
        draw(st.sampled_from(ERAS)), vmx=draw(st.booleans()), evmcs=draw(st.booleans()), hyperv=draw(st.booleans())
    )
    ram = Ram(
        words={0x5000: draw(st.sampled_from([0, VMCS12_REVISION, SHADOW_WORD])), 0x9000: 1, 0x8028: 1, 0x8030: 0x9000}
    )
    if draw(st.booleans()):
        vcpu.msrs[HV_VP_ASSIST_PAGE] = 0x8001
    if draw(st.booleans()):
        do_set(vcpu, ram, blob(flags=draw(st.sampled_from([0, GM, GM | RP])), data=vmcs12(MIN32)))
    vcpu.smm = draw(st.booleans())
    return vcpu, ram


@settings(max_examples=400, deadline=None)
@given(situations(), blobs())
def test_any_blob_is_answered_as_documented(situation: tuple[Vcpu, Ram], data: bytes) -> None:
    vcpu, ram = situation
    before, memory = vcpu.to_head(), bytes(ram.bytes)
    foretold, after = explain_nested_state(vcpu, ram, UserBuffer.of(data))
    assert vcpu.to_head() == before and ram.bytes == memory
    result = do_set(vcpu, ram, data)
    assert result == foretold and vcpu.to_head() == after.to_head()
    assert result.errno in ERRNOS
    assert (result.returns == -1) == (result.errno is not None)
    assert result.returns in (-1, 0, vcpu.kvm.nested.entry_failure)
    assert (result.returns > 0) == (result.check == "V22")
    outcomes = [report.outcome for report in result.trail]
    assert outcomes.count("decides") == 1 and len(outcomes) == len(steps_of(vcpu.profile))
    if result.check in BEFORE_THE_POINT_OF_NO_RETURN:
        assert vcpu.to_head() == before and ram.bytes == memory
    check_state_after(vcpu, ram, result.check, result.errno)
    assert Vcpu.from_head(json.loads(json.dumps(vcpu.to_head()))).to_head() == vcpu.to_head()


def check_state_after(vcpu: Vcpu, ram: Ram, check: str, errno: str | None) -> None:
    got = summary(vcpu, ram)
    assert not isinstance(got, str)
    size, reported, vmxon, vmcs12_pa = got[:4]
    assert size in (128, 4224, 8320)
    if check == "V10":
        assert got == (128, 0, NONE, NONE, 0, 0)
    elif check in ("V12", "V12n", "V13", "V14") and errno:
        assert (size, reported, vmcs12_pa) == (128, 0, NONE) and vmxon != NONE
    elif check in ("V16", "V17", "V20a", "V20b", "V20c", "V21", "V22"):
        assert not reported & (GM | RP)
        assert vmxon != NONE
        if vmcs12_pa != NONE:
            assert size == 4224
        else:
            assert size == (4224 if vcpu.kvm.nested.map_pending else 128)
    elif check == "V23":
        assert reported & GM


@pytest.mark.parametrize("era", ERAS)
def test_every_size_from_0_to_9000(era: str) -> None:
    full = blob(flags=GM, size=8320, data=vmcs12(SHADOWING), shadow=vmcs12(revision=SHADOW_WORD)) + bytes(9000 - 8320)
    vcpu, ram = make_vcpu(era), Ram(words={0x5000: SHADOW_WORD})
    for length in range(9001):
        claimed = full[:4] + length.to_bytes(4, "little") + full[8:length]
        result = do_set(vcpu, ram, claimed[:length])
        if length < 128:
            expected = ("EFAULT", "G1")
        elif length < 1126:
            expected = (None, "V12") if era == "kvm-2019" else ("EINVAL", "V12n")
        elif length < 5222:
            expected = ("EINVAL", "V20a")
        else:
            expected = (None, "V23")
        assert (result.errno, result.check) == expected, length


@pytest.mark.parametrize("era", ERAS)
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=9000))
def test_random_bytes(era: str, data: bytes) -> None:
    vcpu, ram = make_vcpu(era, evmcs=True, hyperv=True), Ram()
    assert do_set(vcpu, ram, data).errno in ERRNOS
    assert isinstance(summary(vcpu, ram), tuple)
    assert abi.encode_blob(json.loads(json.dumps(abi.decode_blob(data)))) == data


@settings(max_examples=300, deadline=None)
@given(blobs())
def test_json_both_ways(data: bytes) -> None:
    document = json.loads(json.dumps(abi.decode_blob(data)))
    assert abi.encode_blob(document) == data
    assert abi.decode_blob(abi.encode_blob(document)) == document


@settings(max_examples=200, deadline=None)
@given(patches, st.sampled_from([0, GM, GM | RP]), st.sampled_from([MIN32, MIN64, SHADOWING]), st.sampled_from(ERAS))
def test_get_set_get_is_the_identity(changes: dict[str, int], wanted: int, page: dict[str, int], era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram(words={0x5000: SHADOW_WORD})
    data = blob(flags=wanted, size=8320, data=vmcs12({**page, **changes}), shadow=vmcs12(revision=SHADOW_WORD))
    if do_set(vcpu, ram, data).returns != 0:
        return
    first = read_nested_state(vcpu, ram)
    assert first is not None
    twin = make_vcpu(era)
    assert do_set(twin, ram, first).returns == 0
    assert read_nested_state(twin, ram) == first


def test_evmcs_get_set_get_today() -> None:
    vcpu, ram = make_vcpu("kvm-latest", evmcs=True, hyperv=True), Ram()
    assert do_set(vcpu, ram, blob(flags=GM | RP | EV, vmcs12_pa=NONE, data=vmcs12(MIN32))).returns == 0
    first = read_nested_state(vcpu, ram)
    assert first is not None
    for _ in range(3):
        assert do_set(vcpu, ram, first).returns == 0
        assert read_nested_state(vcpu, ram) == first


@settings(max_examples=200, deadline=None)
@given(situations(), patches, st.booleans())
def test_vm_entry_never_fails_otherwise(situation: tuple[Vcpu, Ram], changes: dict[str, int], launch: bool) -> None:
    vcpu, ram = situation
    vcpu.smm = False
    if do_set(vcpu, ram, blob(data=vmcs12({**MIN32, **changes}))).returns:
        return
    result = vm_entry(vcpu, ram, launch)
    assert result.result in {
        *("entered", "vmfail-valid", "vmfail-invalid", "entry-failure", "retry", "#UD", "internal-error", "shutdown"),
    }
    assert (result.result == "entered") == vcpu.vmx.guest_mode
    assert do_get(vcpu, ram)[0] is None
