"""The printed SET vectors of nested state. Both test suites run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.vcpu.vcpu import VcpuHost
from tests.engine.nested.support import (
    ERAS,
    EV,
    GM,
    MIN32,
    MIN64,
    MINUS,
    MTF,
    NONE,
    RP,
    SHADOW_WORD,
    SHADOWING,
    narrow_vmx_cpuid,
    vmcs12,
)

OFF = (128, 0, NONE, NONE, 0, 0)
IN_L1 = (4224, 0, 0x1000, 0x2000, 0, 0)
IN_L2 = (4224, GM, 0x1000, 0x2000, 0, 0)
EMPTY = (128, 0, 0x1000, NONE, 0, 0)

ON: dict[str, Any] = {}
EVMCS_ON: dict[str, Any] = {"evmcs": True}
RAM_SHADOW = {0x5000: SHADOW_WORD}
RAM_PLAIN = {0x5000: SHADOW_WORD & 0x7FFF_FFFF}
L2 = {"flags": GM, "data": vmcs12(MIN32)}


@dataclass
class Vector:
    """``returns`` is an errno name or a number; a pair means (2019, newest); ``after`` is None for "not GET-able"."""

    id: str
    vcpu: dict[str, Any]
    blob: dict[str, Any] | None
    returns: Any
    after: Any
    check: Any
    ram: dict[int, int] = field(default_factory=dict)
    prior: tuple[dict[str, Any], ...] = ()

    def of(self, era: str, value: Any) -> Any:
        return value[ERAS.index(era)] if isinstance(value, Both) else value


class Both(tuple[Any, ...]):
    """Expected values of the two kernels."""


def both(old: Any, new: Any) -> Both:
    return Both((old, new))


V = Vector
VECTORS = [
    V("A01", ON, None, "EFAULT", OFF, "G1"),
    V("A02", ON, {"size": 0, "flags": GM + RP}, "EINVAL", OFF, "G2"),
    V("A04", ON, {"size": 128, **MINUS}, 0, OFF, "V10"),
    V("A05", {"vmx": False}, {"flags": 0xF, "size": 128, "vmxon": 0, "vmcs12_pa": 0}, "EINVAL", OFF, both("G3", "V3a")),
    V("A07", ON, {"flags": RP}, "EINVAL", OFF, "G4"),
    V("A08", ON, {"flags": MTF}, both("EINVAL", 0), both(OFF, IN_L1), both("G3", "V18")),
    V("A10", ON, {"flags": 0x10}, "EINVAL", OFF, "G3"),
    V("A11", ON, {"format": 1}, "EINVAL", OFF, "V1"),
    V("B01", {"vmx": False}, MINUS, 0, OFF, "V10"),
    V("B02", {"vmx": False}, {**MINUS, "flags": EV}, "EINVAL", OFF, "V8"),
    V("B04", ON, {**MINUS, "flags": EV}, "EINVAL", OFF, "V8"),
    V("B05", EVMCS_ON, {**MINUS, "flags": EV}, 0, OFF, "V10"),
    V("B07", ON, {"vmxon": NONE}, "EINVAL", OFF, "V2b"),
    V("B08", ON, {**MINUS, "smm": 1}, "EINVAL", OFF, "V2a"),
    V("B10", ON, {**MINUS, "hdr_flags": 1}, 0, OFF, "V10"),
    V("B11", ON, {**MINUS, "hdr_flags": 2}, both(0, "EINVAL"), OFF, both("V10", "V5n")),
    V("B13", ON, {**MINUS, "flags": EV}, "EINVAL", IN_L1, "V8", prior=({},)),
    V("C01", ON, {"vmxon": 1}, "EINVAL", OFF, "V3b"),
    V("C03", ON, {"vmxon": 1 << 39}, "EINVAL", OFF, "V3b"),
    V(
        "C04",
        ON,
        {"vmxon": (1 << 39) - 0x1000, "vmcs12_pa": NONE, "size": 128},
        0,
        (128, 0, 0x7F_FFFF_F000, NONE, 0, 0),
        both("V12", "V12n"),
    ),
    V("C06", {"host": VcpuHost(nested=False)}, {}, "EINVAL", both("EINVAL", OFF), both("G0", "V3a")),
    V("C07", {"host": VcpuHost(nested=False)}, MINUS, both("EINVAL", 0), both("EINVAL", OFF), both("G0", "V10")),
    V("C09", {"cpuid": narrow_vmx_cpuid()}, {"vmxon": 1 << 36}, "EINVAL", OFF, "V3b"),
    V("D01", ON, {"size": 128, "vmcs12_pa": NONE}, 0, EMPTY, both("V12", "V12n")),
    V("D02", ON, {"size": 128}, both(0, "EINVAL"), EMPTY, both("V12", "V12n")),
    V(
        "D04",
        EVMCS_ON,
        {"size": 128, "vmcs12_pa": NONE, "flags": EV},
        both(0, "EINVAL"),
        EMPTY,
        both("V12", "V12n"),
    ),
    V("D05", ON, {"size": 1125}, both(0, "EINVAL"), EMPTY, both("V12", "V12n")),
    V("D06", ON, {"size": 1126}, 0, IN_L1, "V18"),
    V("D08", ON, {"size": 1126, "vmcs12_pa": NONE}, "EINVAL", EMPTY, "V14"),
    V("D09", ON, {"size": 0xFFFF_FFFF}, 0, IN_L1, "V18"),
    V("D11", ON, {"size": 128, "vmcs12_pa": NONE}, 0, EMPTY, both("V12", "V12n"), prior=({},)),
    V("E01", ON, {"vmxon": 0, "vmcs12_pa": 0}, "EINVAL", (128, 0, 0, NONE, 0, 0), "V13"),
    V("E03", ON, {"vmcs12_pa": 1 << 39}, "EINVAL", EMPTY, "V13"),
    V("E04", ON, {"vmcs12_pa": 0}, 0, (4224, 0, 0x1000, 0, 0, 0), "V18"),
    V("E05", EVMCS_ON, {"flags": EV}, 0, IN_L1, "V18"),
    V("E07", ON, {"flags": EV}, "EINVAL", OFF, "V8"),
    V("E08", EVMCS_ON, {"vmcs12_pa": NONE}, "EINVAL", EMPTY, "V14"),
    V("F02", ON, {"data": vmcs12(revision=0x91E5_7ED0)}, 0, IN_L1, "V18"),
    V("F03", ON, {"data": vmcs12(revision=0x11E5_7ED1)}, "EINVAL", IN_L1, "V17"),
    V("G01", ON, {"smm": 1}, "EINVAL", OFF, "V6"),
    V("G02", ON, {"smm": 2}, "EINVAL", OFF, "V6"),
    V("G04", ON, {"smm": 1, "flags": GM + RP}, "EINVAL", OFF, "V4"),
    V("G05", {"smm": True}, {}, 0, IN_L1, "V18"),
    V("G07", {"smm": True}, {"smm": 3}, 0, (4224, 0, 0x1000, 0x2000, 3, 0), "V18"),
    V("G08", {"smm": True}, {"smm": 1}, "EINVAL", OFF, "V7"),
    V("G10", {"smm": True}, {"smm": 2, "size": 128, "vmcs12_pa": NONE}, 0, EMPTY, both("V12", "V12n")),
    V(
        "G11",
        {"smm": True, "evmcs": True},
        {"flags": EV, "smm": 3, "vmcs12_pa": NONE},
        0,
        both((128, 0, 0x1000, NONE, 3, 0), (4224, EV, 0x1000, NONE, 3, 0)),
        "V18",
    ),
    V("H01", ON, {"flags": GM}, "EINVAL", IN_L1, "V21 ctl:pin"),
    V("H02", ON, L2, 0, IN_L2, "V23"),
    V("H03", ON, {**L2, "flags": GM + RP}, 0, (4224, GM + RP, 0x1000, 0x2000, 0, 0), "V23"),
    V("H05", ON, {"flags": GM, "data": vmcs12(MIN32, guest_cr4=0)}, "EINVAL", IN_L1, "V21 guest:guest cr"),
    V("H06", ON, {"flags": GM, "data": vmcs12(MIN32, host_cr0=0)}, "EINVAL", IN_L1, "V21 host:hostcr"),
    V("H08", ON, {"flags": GM, "data": vmcs12(MIN32, vmcs_link_pointer=0x5000)}, 0, IN_L2, "V23", RAM_PLAIN),
    V("H09", ON, {"flags": GM, "data": vmcs12(SHADOWING)}, "EINVAL", IN_L1, "V20a shadow size", RAM_SHADOW),
    V(
        "H10",
        ON,
        {"flags": GM, "size": 8320, "data": vmcs12(SHADOWING), "shadow": vmcs12(revision=SHADOW_WORD)},
        0,
        (8320, GM, 0x1000, 0x2000, 0, 0),
        "V23",
        RAM_SHADOW,
    ),
    V(
        "H12",
        ON,
        {"flags": GM, "size": 5221, "data": vmcs12(SHADOWING), "shadow": vmcs12(revision=SHADOW_WORD)},
        "EINVAL",
        IN_L1,
        "V20a shadow size",
        RAM_SHADOW,
    ),
    V(
        "H13",
        ON,
        {"flags": GM, "size": 8320, "data": vmcs12(SHADOWING), "shadow": vmcs12()},
        "EINVAL",
        IN_L1,
        "V20c shadow hdr",
        RAM_SHADOW,
    ),
    V(
        "H15",
        EVMCS_ON,
        {"flags": GM, "size": 8320, "data": vmcs12(SHADOWING), "shadow": vmcs12(revision=SHADOW_WORD)},
        both("EINVAL", 0),
        both(IN_L1, (8320, GM, 0x1000, 0x2000, 0, 0)),
        both("V21 ctl:sec", "V23"),
        RAM_SHADOW,
    ),
    V(
        "H16",
        {"evmcs": True, "hyperv": True},
        {"flags": GM, "size": 8320, "data": vmcs12(SHADOWING), "shadow": vmcs12(revision=SHADOW_WORD)},
        "EINVAL",
        IN_L1,
        both("V21 ctl:sec", "V21 ctl:evmcs secondary_vm_exec_control"),
        RAM_SHADOW,
    ),
    V(
        "H17",
        ON,
        {"flags": GM, "data": vmcs12(MIN32, pin_based_vm_exec_control=0x56)},
        0,
        both(IN_L2, (4224, GM, 0x1000, 0x2000, 0, 1)),
        "V23",
    ),
    V(
        "H18",
        EVMCS_ON,
        {"flags": GM, "data": vmcs12(MIN32, pin_based_vm_exec_control=0x56)},
        both("EINVAL", 0),
        both(IN_L1, (4224, GM, 0x1000, 0x2000, 0, 1)),
        both("V21 ctl:pin", "V23"),
    ),
    V(
        "H19",
        {"evmcs": True, "hyperv": True},
        {"flags": GM, "data": vmcs12(MIN32, pin_based_vm_exec_control=0x56)},
        "EINVAL",
        IN_L1,
        both("V21 ctl:pin", "V21 ctl:evmcs pin_based_vm_exec_control"),
    ),
    V(
        "H20",
        ON,
        {"flags": GM + RP, "data": vmcs12(MIN32, vm_entry_controls=0x91FB, guest_ia32_efer=0x500)},
        "EINVAL",
        IN_L1,
        "V21 guest:guest efer",
    ),
    V("H22", ON, {"flags": GM, "data": vmcs12(MIN32, guest_activity_state=2)}, "EINVAL", IN_L1, "V21 guest:activity"),
    V(
        "H23",
        ON,
        {"flags": GM, "data": vmcs12(MIN32, guest_activity_state=3)},
        both("EINVAL", 0),
        both(IN_L1, IN_L2),
        both("V21 guest:activity", "V23"),
    ),
    V("H24", ON, {"flags": GM, "data": vmcs12(MIN32, guest_cr3=1 << 39)}, both(1, 2), IN_L1, "V22 cr3"),
    V(
        "H25",
        ON,
        {"flags": GM, "data": vmcs12(MIN32, vm_exit_controls=0x36FFB)},
        both(0, "EINVAL"),
        both(IN_L2, IN_L1),
        both("V23", "V21 host:host pae"),
    ),
    V("H26", ON, {"flags": GM, "data": vmcs12(MIN64)}, 0, IN_L2, "V23"),
    V(
        "H27",
        EVMCS_ON,
        {"flags": GM + EV, "vmcs12_pa": NONE, "data": vmcs12(MIN32)},
        0,
        both((4224, GM, 0x1000, NONE, 0, 0), (4224, GM + EV, 0x1000, NONE, 0, 0)),
        "V23",
    ),
    V(
        "H29",
        ON,
        {"flags": GM, "hdr_flags": 1, "deadline": 0x1234, "data": vmcs12(MIN32, pin_based_vm_exec_control=0x56)},
        0,
        both(IN_L2, (4224, GM, 0x1000, 0x2000, 0, 1)),
        "V23",
    ),
    V("H30", ON, {**L2, "hdr_flags": 1}, 0, IN_L2, "V23"),
    V("H32", ON, {"flags": GM, "data": vmcs12(MIN32, cr3_target_count=1)}, "EINVAL", IN_L1, "V21 ctl:cr3count"),
    V(
        "H33",
        ON,
        {"flags": GM, "data": vmcs12(MIN32, pin_based_vm_exec_control=0x36)},
        "EINVAL",
        IN_L1,
        "V21 ctl:vnmi",
    ),
    V("H35", ON, {"flags": GM, "data": vmcs12(MIN32, revision=0x91E5_7ED0)}, 0, IN_L2, "V23"),
    V("I01", ON, {"format": 1}, "EINVAL", IN_L2, "V1", prior=(L2,)),
    V("I03", ON, MINUS, 0, OFF, "V10", prior=(L2,)),
    V("I04", ON, {"vmcs12_pa": 0x1000}, "EINVAL", EMPTY, "V13", prior=(L2,)),
]
