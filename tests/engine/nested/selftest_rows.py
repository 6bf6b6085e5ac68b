"""The upstream programs row by row: vmx_set_nested_state_test of 2019 and the newest one, on VMX and on SVM.

A row is its number, the blob, what SET returns and the check that decides. Between two parts of rows a program gives
its vCPU what the name of the later part says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.engine.nested.support import EV, GIF, GM, MINUS, NONE, RP, vmcs12

Row = tuple[int, dict[str, Any] | None, int | str, str]

ZERO = {"vmxon": 0, "vmcs12_pa": 0}
SMALL = {"size": 128, "data": b"", **ZERO, "flags": GM + RP}
SVM = {"format": 1, "vmxon": 0x3000, "vmcs12_pa": 0, "data": bytes(4096)}


class VmxRows(NamedTuple):
    """The parts of a program on Intel; one without the enlightened VMCS does not enable it."""

    fresh: list[Row]
    with_vmx: list[Row]
    with_evmcs: list[Row]


def rows_of_2019(have_evmcs: bool) -> VmxRows:
    ev = EV if have_evmcs else 0
    default = {"flags": GM + RP + ev}
    return VmxRows(
        [
            (1, None, "EFAULT", "G1"),
            (2, {**SMALL, "size": 0}, "EINVAL", "G2"),
            (3, {**SMALL, "flags": 0xF}, "EINVAL", "G3"),
            (4, {**SMALL, "flags": RP}, "EINVAL", "G4"),
            (5, {**default, "format": 1}, "EINVAL", "V1"),
            (6, default, "EINVAL", "V3a"),
            (7, {**default, "vmxon": NONE}, "EINVAL", "V2b"),
            (8, {**default, **MINUS, "flags": EV}, "EINVAL", "V8"),
            (9, {**default, **MINUS, "flags": 0}, 0, "V10"),
        ],
        [
            (10, {**default, **MINUS}, "EINVAL", "V2c"),
            *([(11, {**MINUS, "flags": EV}, "EINVAL", "V8")] if have_evmcs else []),
        ],
        [
            (12, {**MINUS, "flags": ev}, 0, "V10"),
            (13, {**MINUS, "flags": ev, "smm": 1}, "EINVAL", "V2a"),
            (14, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b"),
            (15, {**default, "vmxon": 1}, "EINVAL", "V3b"),
            (16, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4"),
            (17, {**default, "smm": 0xFFFC}, "EINVAL", "V5"),
            (18, {"flags": 0, "smm": 1}, "EINVAL", "V6"),
            (19, {**default, "size": 128}, 0, "V12"),
            (20, {**default, **ZERO}, "EINVAL", "V13"),
            (21, {**default, "data": vmcs12(revision=0)}, "EINVAL", "V17"),
            (22, {"flags": 0, **MINUS}, 0, "V10"),
        ],
    )


def newest_vmx_rows(have_evmcs: bool) -> VmxRows:
    ev = EV if have_evmcs else 0
    default = {"flags": ev}
    short = {"flags": 0, "size": 128}
    return VmxRows(
        [
            (1, None, "EFAULT", "G1"),
            (2, {**SMALL, "size": 0}, "EINVAL", "G2"),
            (3, {**SMALL, "flags": 0xF}, "EINVAL", "V3a"),
            (4, {**SMALL, "flags": RP}, "EINVAL", "G4"),
            (5, {**default, "format": 1}, "EINVAL", "V1"),
            (6, default, "EINVAL", "V3a"),
            (7, {**default, "vmxon": NONE}, "EINVAL", "V2b"),
            (8, {**MINUS, "flags": EV}, "EINVAL", "V8"),
            (9, {**MINUS, "flags": 0}, 0, "V10"),
        ],
        [
            (10, {"flags": 0, **MINUS}, 0, "V10"),
            *([(11, {"flags": EV, **MINUS}, "EINVAL", "V8")] if have_evmcs else []),
        ],
        [
            *([(12, {"flags": EV, **MINUS}, 0, "V10")] if have_evmcs else []),
            (13, {"flags": ev, **MINUS, "smm": 1}, "EINVAL", "V2a"),
            (14, {**default, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n"),
            (15, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b"),
            (16, {**default, "vmxon": 1}, "EINVAL", "V3b"),
            (17, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4"),
            (18, {**default, "smm": 0xFFFC}, "EINVAL", "V5"),
            (19, {"flags": 0, "smm": 1}, "EINVAL", "V6"),
            (20, short, "EINVAL", "V12n"),
            (21, {**short, "vmcs12_pa": NONE}, 0, "V12n"),
            (22, {"flags": 0}, 0, "V18"),
            (23, {**short, "vmcs12_pa": NONE, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n"),
            (24, {**default, **ZERO}, "EINVAL", "V13"),
            (25, {"flags": 0, **MINUS}, 0, "V10"),
        ],
    )


SVM_FRESH: list[Row] = [
    (1, None, "EFAULT", "G1"),
    (2, {**SVM, "size": 0}, "EINVAL", "G2"),
    (3, {**SMALL, "flags": 0xF}, "EINVAL", "S1"),
    (4, {**SVM, "flags": RP}, "EINVAL", "G4"),
    (5, {**SVM, "format": 0}, "EINVAL", "S1"),
    (6, {**SVM, "flags": EV}, "EINVAL", "S2"),
    (7, {**SVM, "flags": GM}, "EINVAL", "S3"),
    (8, {**SVM, "flags": 0}, 0, "S5"),
    (9, {**SVM, "flags": GIF}, 0, "S5"),
]
SVM_WITH_SVME: list[Row] = [
    (10, {**SVM, "vmxon": NONE, "flags": 0}, 0, "S5"),
    (11, {**SVM, "vmxon": NONE, "flags": GM}, "EINVAL", "S6"),
    (12, {**SVM, "size": 2112, "flags": 0}, 0, "S5"),
    (13, {**SVM, "size": 2112, "flags": GM}, "EINVAL", "S7"),
    (14, {**SVM, "vmxon": NONE, "flags": GIF}, 0, "S5"),
]
