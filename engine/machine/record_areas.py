"""What a vCPU keeps in its record beside registers: its APIC's page and its extended state, as they were set.

A vCPU to which nobody gave them has neither, and takes no room for them: the words of its record are there anyway.
"""

from __future__ import annotations

import numpy as np

from engine.arch import controls as ctl
from engine.arch.kvm_vcpu_structs import LAPIC_SIZE
from engine.cpu import frames
from engine.cpu.frames import Words
from engine.vcpu.extended_state import AREA_SIZE
from engine.vcpu.vcpu import Vcpu

_LAPIC, _X2APIC, _XSAVE = 1 << 0, 1 << 1, 1 << 2
_PLACES = ((int(ctl.V_LAPIC), LAPIC_SIZE), (int(ctl.V_XSAVE), AREA_SIZE))


def take(vcpu: Vcpu, words: Words) -> None:
    """Give a vCPU what the words of its record hold."""
    flags = int(words[ctl.V_AREAS])
    lapic, xsave = (words[at : at + size // 8].tobytes() for at, size in _PLACES) if flags else (b"", b"")
    vcpu.lapic = lapic if flags & _LAPIC else b""
    vcpu.lapic_x2apic = bool(flags & _X2APIC)
    vcpu.xsave = xsave if flags & _XSAVE else b""


def put(machine: frames.Machine, frame: int, vcpu: Vcpu) -> None:
    """Put it back into its record."""
    flags = (_LAPIC if vcpu.lapic else 0) | (_X2APIC if vcpu.lapic_x2apic else 0) | (_XSAVE if vcpu.xsave else 0)
    frames.write_word(machine, frame, ctl.V_AREAS, flags)
    for (at, size), area in zip(_PLACES, (vcpu.lapic, vcpu.xsave), strict=True):
        words = np.frombuffer(area.ljust(size, b"\0"), dtype=np.int64)
        if (machine.rows[machine.row_of[frame], at : at + len(words)] != words).any():
            machine.rows[frames.own(machine, frame), at : at + len(words)] = words
