"""Whoever executes VMCALL or VMMCALL: its registers and mode, and the hypercall that they describe.

64-bit code has the input value in RCX, its block or first words in RDX and R8, the result in RAX. All other code has
them in EDX:EAX, EBX:ECX and EDI:ESI, the result in EDX:EAX. XMM0 to XMM5 follow in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.arch import hypercall as hv
from engine.errors import InvalidValue

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")
WORD = (1 << 64) - 1
LOW = (1 << 32) - 1

# What native KVM hypercalls return: unknown number, not allowed; and the numbers that have nothing to do here.
KVM_ENOSYS = -1000
KVM_EPERM = -1
KVM_HARMLESS = frozenset({1, 5, 11})


@dataclass(frozen=True)
class Caller:
    """Registers at the instruction. ``xmm`` holds 128-bit numbers; ``long_mode`` is EFER.LMA and CS.L."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    xmm: tuple[int, ...] = (0,) * hv.XMM_REGISTERS
    long_mode: bool = True
    cpl: int = 0
    protected: bool = True

    def validate(self) -> None:
        """Raises InvalidValue for a register that holds more than it can."""
        for name in GENERAL:
            if not 0 <= getattr(self, name) <= WORD:
                raise InvalidValue(
                    "must fit in 64 bits without a sign", field=f"registers.{name}", value=getattr(self, name)
                )
        if len(self.xmm) != hv.XMM_REGISTERS:
            raise InvalidValue("must be six registers", field="registers.xmm", value=len(self.xmm))
        for number, value in enumerate(self.xmm):
            if not 0 <= value < 1 << 128:
                raise InvalidValue("must fit in 128 bits without a sign", field=f"registers.xmm{number}", value=value)
        if not 0 <= self.cpl <= 3:
            raise InvalidValue("must be 0 to 3", field="cpl", value=self.cpl)

    @property
    def control(self) -> hv.Control:
        """The input value."""
        return hv.Control.of(self.rcx if self.long_mode else _pair(self.rdx, self.rax))

    @property
    def code_register(self) -> int:
        """The call code as a lower hypervisor looks at it before anything else."""
        return (self.rcx if self.long_mode else self.rax) & hv.CODE_MASK

    @property
    def input_gpa(self) -> int:
        """GPA of the input block, or the first word of a fast call."""
        return self.rdx if self.long_mode else _pair(self.rbx, self.rcx)

    @property
    def fast_words(self) -> tuple[int, ...]:
        """The 14 words of a fast call."""
        second = self.r8 if self.long_mode else _pair(self.rdi, self.rsi)
        halves = [half for value in self.xmm for half in (value & WORD, value >> 64)]
        return (self.input_gpa, second, *halves)

    @property
    def undefined(self) -> bool:
        """The instruction raises #UD: privilege level, or real mode."""
        return self.cpl != 0 or not self.protected

    def result_registers(self, value: int) -> Mapping[str, int]:
        """The registers that a result value changes."""
        if self.long_mode:
            return {"rax": value}
        return {"rdx": value >> 32, "rax": value & LOW}

    def native_result(self) -> Mapping[str, int]:
        """What KVM answers when it takes the call for one of its own, by the number in RAX."""
        number = self.rax if self.long_mode else self.rax & LOW
        answer = KVM_EPERM if self.cpl else 0 if number in KVM_HARMLESS else KVM_ENOSYS
        return {"rax": answer & (WORD if self.long_mode else LOW)}


def _pair(high: int, low: int) -> int:
    return (high & LOW) << 32 | low & LOW
