"""The upstream programs row by row: vmx_set_nested_state_test of 2019, and the newest one on VMX and on SVM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from .support import EV, GIF, GM, NONE, RP, blob, vmcs12

ZERO = {"vmxon": 0, "vmcs12_pa": 0}
MINUS = {"vmxon": NONE, "vmcs12_pa": NONE}
SMALL = {"size": 128, "data": b"", **ZERO, "flags": GM + RP}
SVM = {"format": 1, "vmxon": 0x3000, "vmcs12_pa": 0, "data": bytes(4096)}


class Row(NamedTuple):
    """A SET of a program: fields of its blob (None: a bad pointer), what it returns, the check that decides."""

    number: int
    fields: dict[str, Any] | None
    returns: int | str
    check: str

    @property
    def data(self) -> bytes | None:
        return None if self.fields is None else blob(**self.fields)


# What the programs do between their rows.
Step = Literal["set CPUID", "enable evmcs", "set EFER.SVME"]
Program = Iterator[Row | Step]


def of_2019(have_evmcs: bool) -> Program:
    """On a vCPU without CPUID."""
    ev = EV if have_evmcs else 0
    default = {"flags": GM + RP + ev}
    yield Row(1, None, "EFAULT", "G1")
    yield Row(2, {**SMALL, "size": 0}, "EINVAL", "G2")
    yield Row(3, {**SMALL, "flags": 0xF}, "EINVAL", "G3")
    yield Row(4, {**SMALL, "flags": RP}, "EINVAL", "G4")
    yield Row(5, {**default, "format": 1}, "EINVAL", "V1")
    yield Row(6, default, "EINVAL", "V3a")
    yield Row(7, {**default, "vmxon": NONE}, "EINVAL", "V2b")
    yield Row(8, {**MINUS, "flags": EV}, "EINVAL", "V8")
    yield Row(9, {**MINUS, "flags": 0}, 0, "V10")
    yield "set CPUID"
    yield Row(10, {**default, **MINUS}, "EINVAL", "V2c")
    if have_evmcs:
        yield Row(11, {**MINUS, "flags": ev}, "EINVAL", "V8")
        yield "enable evmcs"
    yield Row(12, {**MINUS, "flags": ev}, 0, "V10")
    yield Row(13, {**MINUS, "flags": ev, "smm": 1}, "EINVAL", "V2a")
    yield Row(14, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b")
    yield Row(15, {**default, "vmxon": 1}, "EINVAL", "V3b")
    yield Row(16, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4")
    yield Row(17, {**default, "smm": 0xFFFC}, "EINVAL", "V5")
    yield Row(18, {"flags": 0, "smm": 1}, "EINVAL", "V6")
    yield Row(19, {**default, "size": 128}, 0, "V12")
    yield Row(20, {**default, **ZERO}, "EINVAL", "V13")
    yield Row(21, {**default, "data": vmcs12(revision=0)}, "EINVAL", "V17")
    yield Row(22, {"flags": 0, **MINUS}, 0, "V10")


def newest_on_intel(have_evmcs: bool) -> Program:
    """On a vCPU whose CPUID has no VMX."""
    ev = EV if have_evmcs else 0
    default = {"flags": ev}
    short = {"flags": 0, "size": 128}
    yield Row(1, None, "EFAULT", "G1")
    yield Row(2, {**SMALL, "size": 0}, "EINVAL", "G2")
    yield Row(3, {**SMALL, "flags": 0xF}, "EINVAL", "V3a")
    yield Row(4, {**SMALL, "flags": RP}, "EINVAL", "G4")
    yield Row(5, {**default, "format": 1}, "EINVAL", "V1")
    yield Row(6, default, "EINVAL", "V3a")
    yield Row(7, {**default, "vmxon": NONE}, "EINVAL", "V2b")
    yield Row(8, {**MINUS, "flags": EV}, "EINVAL", "V8")
    yield Row(9, {**MINUS, "flags": 0}, 0, "V10")
    yield "set CPUID"
    yield Row(10, {"flags": 0, **MINUS}, 0, "V10")
    if have_evmcs:
        yield Row(11, {"flags": EV, **MINUS}, "EINVAL", "V8")
        yield "enable evmcs"
        yield Row(12, {"flags": EV, **MINUS}, 0, "V10")
    yield Row(13, {"flags": ev, **MINUS, "smm": 1}, "EINVAL", "V2a")
    yield Row(14, {**default, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n")
    yield Row(15, {"flags": 0, "vmxon": NONE}, "EINVAL", "V2b")
    yield Row(16, {**default, "vmxon": 1}, "EINVAL", "V3b")
    yield Row(17, {"flags": GM + RP, "smm": 1}, "EINVAL", "V4")
    yield Row(18, {**default, "smm": 0xFFFC}, "EINVAL", "V5")
    yield Row(19, {"flags": 0, "smm": 1}, "EINVAL", "V6")
    yield Row(20, short, "EINVAL", "V12n")
    yield Row(21, {**short, "vmcs12_pa": NONE}, 0, "V12n")
    yield Row(22, {"flags": 0}, 0, "V18")
    yield Row(23, {**short, "vmcs12_pa": NONE, "hdr_flags": 0xFFFF_FFFF}, "EINVAL", "V5n")
    yield Row(24, {**default, **ZERO}, "EINVAL", "V13")
    yield Row(25, {"flags": 0, **MINUS}, 0, "V10")


def newest_on_amd() -> Program:
    """On a vCPU with the host's CPUID."""
    yield Row(1, None, "EFAULT", "G1")
    yield Row(2, {**SVM, "size": 0}, "EINVAL", "G2")
    yield Row(3, {**SMALL, "flags": 0xF}, "EINVAL", "S1")
    yield Row(4, {**SVM, "flags": RP}, "EINVAL", "G4")
    yield Row(5, {**SVM, "format": 0}, "EINVAL", "S1")
    yield Row(6, {**SVM, "flags": EV}, "EINVAL", "S2")
    yield Row(7, {**SVM, "flags": GM}, "EINVAL", "S3")
    yield Row(8, {**SVM, "flags": 0}, 0, "S5")
    yield Row(9, {**SVM, "flags": GIF}, 0, "S5")
    yield "set EFER.SVME"
    yield Row(10, {**SVM, "vmxon": NONE, "flags": 0}, 0, "S5")
    yield Row(11, {**SVM, "vmxon": NONE, "flags": GM}, "EINVAL", "S6")
    yield Row(12, {**SVM, "size": 2112, "flags": 0}, 0, "S5")
    yield Row(13, {**SVM, "size": 2112, "flags": GM}, "EINVAL", "S7")
    yield Row(14, {**SVM, "vmxon": NONE, "flags": GIF}, 0, "S5")
