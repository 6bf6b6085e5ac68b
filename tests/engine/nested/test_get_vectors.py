"""Every printed GET vector, and what the pages contain."""

from __future__ import annotations

import pytest

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch.vmcs12 import VMCS12, VMCS12_REVISION
from engine.nested import (
    enable_evmcs,
    exit_to_l1,
    get_nested_state,
    max_state_size,
    prepare_run,
    read_nested_state,
    vm_entry,
    vmptrld,
)
from engine.vcpu.msr_numbers import HV_VP_ASSIST_PAGE
from engine.vcpu.vcpu import VcpuHost
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
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

FILL = 0xEE


def with_room(vcpu: object, room: int, size: int = 0x4000) -> tuple[str | None, bytes]:
    user = UserBuffer(bytearray([FILL]) * size)
    user.copy_to(4, room.to_bytes(4, "little"))
    result = get_nested_state(vcpu, Ram(), user)  # type: ignore[arg-type]
    assert user.data is not None
    return result.errno, bytes(user.data)


def untouched(data: bytes) -> bool:
    return set(data[:4] + data[8:]) == {FILL}


@pytest.mark.parametrize("era", ERAS)
def test_j02_j03_fresh(era: str) -> None:
    errno, data = with_room(make_vcpu(era), 127)
    assert (errno, int.from_bytes(data[4:8], "little"), untouched(data)) == ("E2BIG", 128, True)
    errno, data = with_room(make_vcpu(era), 128)
    assert errno is None
    assert data[:128] == bytes(4) + (128).to_bytes(4, "little") + b"\xff" * 16 + bytes(104)
    assert set(data[128:]) == {FILL}


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("room", [128, 4223])
def test_j05_j06_too_small_for_a_vmcs12(era: str, room: int) -> None:
    vcpu = make_vcpu(era)
    do_set(vcpu, Ram(), blob(size=1126))
    errno, data = with_room(vcpu, room)
    assert (errno, int.from_bytes(data[4:8], "little"), untouched(data)) == ("E2BIG", 4224, True)


@pytest.mark.parametrize("era", ERAS)
def test_j07_a_vmcs12_page_is_what_set_loaded_and_zeros(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    page = vmcs12(MIN32)[:998] + b"\x55" * (4096 - 998)
    assert do_set(vcpu, ram, blob(data=page)).returns == 0
    errno, data = do_get(vcpu, ram, 4224)
    assert errno is None
    assert data[128:4224] == page[:998] + bytes(4096 - 998)


@pytest.mark.parametrize("era", ERAS)
def test_j08_j09_shadow(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram(words={0x5000: SHADOW_WORD})
    shadow = vmcs12(revision=SHADOW_WORD)[:998] + b"\x33" * (4096 - 998)
    assert do_set(vcpu, ram, blob(flags=GM, size=8320, data=vmcs12(SHADOWING), shadow=shadow)).returns == 0
    errno, data = with_room(vcpu, 4224)
    assert (errno, int.from_bytes(data[4:8], "little"), untouched(data)) == ("E2BIG", 8320, True)
    errno, data = with_room(vcpu, 8320)
    assert errno is None
    assert data[4224:8320] == shadow[:998] + bytes(4096 - 998)


@pytest.mark.parametrize("era", ERAS)
def test_j11_j12_faults(era: str) -> None:
    vcpu = make_vcpu(era)
    assert get_nested_state(vcpu, Ram(), UserBuffer(None)).errno == "EFAULT"
    assert get_nested_state(vcpu, Ram(), UserBuffer(bytearray(8), read_only=True)).errno == "EFAULT"
    assert get_nested_state(vcpu, Ram(), UserBuffer(bytearray(7))).errno == "EFAULT"


@pytest.mark.parametrize("host", [VcpuHost(nested=False), VcpuHost(vendor="amd")])
def test_j14_no_hook_in_2019(host: VcpuHost) -> None:
    vcpu = make_vcpu("kvm-2019", host=host)
    assert with_room(vcpu, 8320)[0] == "EINVAL"
    assert read_nested_state(vcpu, Ram()) is None


@pytest.mark.parametrize(
    ("era", "host", "size"),
    [
        ("kvm-2019", VcpuHost(), 8320),
        ("kvm-2019", VcpuHost(nested=False), 0),
        ("kvm-2019", VcpuHost(vendor="amd"), 0),
        ("kvm-latest", VcpuHost(), 8320),
        ("kvm-latest", VcpuHost(nested=False), 8320),
        ("kvm-latest", VcpuHost(vendor="amd"), 4224),
    ],
)
def test_largest_state(era: str, host: VcpuHost, size: int) -> None:
    assert max_state_size(make_vcpu(era, host=host)) == size


@pytest.mark.parametrize("era", ERAS)
def test_a_buffer_that_ends_early_keeps_what_fitted(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    do_set(vcpu, ram, blob(data=vmcs12(MIN32)))
    user = UserBuffer(bytearray(1000))
    user.copy_to(4, (4224).to_bytes(4, "little"))
    assert get_nested_state(vcpu, ram, user).errno == "EFAULT"
    assert user.data is not None
    assert user.data[8:16] == (0x1000).to_bytes(8, "little")
    assert user.data[128:] == vmcs12(MIN32)[: 1000 - 128]


@pytest.mark.parametrize("era", ERAS)
def test_l1_copies_the_shadow_beyond_the_reported_size(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    do_set(vcpu, ram, blob(data=vmcs12(SHADOWING)))
    errno, data = do_get(vcpu, ram)
    assert errno is None
    assert abi.COMMON.get(data, "size") == 4224
    assert data[4224:8320] == bytes(4096)
    assert set(data[8320:]) == {FILL}
    user = UserBuffer(bytearray(4224))
    user.copy_to(4, (4224).to_bytes(4, "little"))
    assert get_nested_state(vcpu, ram, user).errno is None


@pytest.mark.parametrize("era", ERAS)
def test_vmx_that_vanished_from_cpuid_reports_nothing(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    do_set(vcpu, ram, blob())
    vcpu.cpuid = ()
    assert summary(vcpu, ram) == (128, 0, NONE, NONE, 0, 0)


@pytest.mark.parametrize("era", ERAS)
def test_get_in_l2_takes_the_live_registers(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    changes = {
        "guest_rip": 0x1000,
        "guest_linear_address": 5,
        "guest_activity_state": 1,
        "guest_interruptibility_info": 3,
    }
    for flags, interruptibility in ((GM, 0), (GM | RP, 3)):
        assert do_set(vcpu, ram, blob(flags=flags, data=vmcs12(MIN32, **changes))).returns == 0
        vcpu.registers["rip"] = 0x2000
        vcpu.registers["cs_base"] = 0x55
        page = bytes(do_get(vcpu, ram)[1][128:4224])
        expected = {
            "guest_rip": 0x2000,
            "guest_cs_base": 0x55,
            "guest_linear_address": 0,
            "guest_activity_state": 0,
            "guest_interruptibility_info": interruptibility,
        }
        assert {name: VMCS12.get(page, name) for name in expected} == expected


@pytest.mark.parametrize("era", ERAS)
def test_get_saves_dr7_and_efer_when_the_exit_controls_say_so(era: str) -> None:
    saved = {"vm_exit_controls": 0x36DFB | 1 << 2 | 1 << 20, "guest_dr7": 0x401, "guest_ia32_efer": 1}
    for entry, flags, dr7, efer in (
        (0x11FB, GM | RP, 0x400, 0),
        (0x11FF | 1 << 15, GM, 0x400, 0),
        (0x11FF | 1 << 15, GM | RP, 0x401, 1),
    ):
        vcpu, ram = make_vcpu(era), Ram()
        data = vmcs12(MIN32, **saved, vm_entry_controls=entry)
        assert do_set(vcpu, ram, blob(flags=flags, data=data)).returns == 0
        page = bytes(do_get(vcpu, ram)[1][128:4224])
        assert (VMCS12.get(page, "guest_dr7"), VMCS12.get(page, "guest_ia32_efer")) == (dr7, efer)


@pytest.mark.parametrize("era", ERAS)
def test_typical_results_after_instructions(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    ram.bytes[0x2000:0x3000] = vmcs12(MIN32)[:4090] + b"\x77" * 6
    assert do_set(vcpu, ram, blob(size=128, vmcs12_pa=NONE)).returns == 0
    assert summary(vcpu, ram) == (128, 0, 0x1000, NONE, 0, 0)
    assert vmptrld(vcpu, ram, 0x2000).result == "succeed"
    assert summary(vcpu, ram) == (4224, 0, 0x1000, 0x2000, 0, 0)
    assert do_get(vcpu, ram)[1][4216:4224] == b"\0\0" + b"\x77" * 6
    assert vm_entry(vcpu, ram).result == "entered"
    assert summary(vcpu, ram) == (4224, GM | RP, 0x1000, 0x2000, 0, 0)
    prepare_run(vcpu, ram)
    assert summary(vcpu, ram) == (4224, GM, 0x1000, 0x2000, 0, 0)
    exit_to_l1(vcpu, ram, 18, 0)
    assert summary(vcpu, ram) == (4224, 0, 0x1000, 0x2000, 0, 0)
    page = bytes(do_get(vcpu, ram)[1][128:4224])
    assert (VMCS12.get(page, "vm_exit_reason"), VMCS12.get(page, "launch_state")) == (18, 1)


@pytest.mark.parametrize("era", ERAS)
def test_reading_changes_nothing(era: str) -> None:
    vcpu, ram = make_vcpu(era), Ram()
    do_set(vcpu, ram, blob(flags=GM, data=vmcs12(MIN32, guest_linear_address=5)))
    before = vcpu.to_head()
    data = read_nested_state(vcpu, ram)
    assert data is not None and len(data) == 4224
    assert vcpu.to_head() == before


@pytest.mark.parametrize("era", ERAS)
def test_get_in_l1_copies_an_attached_evmcs(era: str) -> None:
    vcpu = make_vcpu(era, hyperv=True)
    enable_evmcs(vcpu)
    ram = Ram()
    vcpu.msrs[HV_VP_ASSIST_PAGE] = 0x8001
    ram.put(0x8000 + 40, 1, 1)
    ram.put(0x8000 + 48, 0x9000)
    ram.put(0x9000, 1, 4)
    assert do_set(vcpu, ram, blob(size=128, vmcs12_pa=NONE)).returns == 0
    assert vm_entry(vcpu, ram).result == "vmfail-valid"
    assert summary(vcpu, ram) == (4224, EV, 0x1000, NONE, 0, 0)
    ram.put(0x9000 + 92, 0x1234, 4)
    ram.put(0x9000 + 824, 1 << 3, 4)
    page = bytes(do_get(vcpu, ram)[1][128:4224])
    assert VMCS12.get(page, "revision") == VMCS12_REVISION
    # In 2019 the clean bits are honoured here, so a corrupted control goes unseen.
    assert VMCS12.get(page, "pin_based_vm_exec_control") == (0 if era == "kvm-2019" else 0x1234)
