"""Method (c): an emulator that calls Python for every write, which is how such checks are usually first written."""

from __future__ import annotations

import importlib
from typing import Any

from bench.data import Policy

CODE_AT, DATA_AT, DATA_BYTES = 0x10_0000, 0x100_0000, 1 << 24
WRITES = 300_000

# mov [rdi], rax; add rdi, 8; and rdi, rdx; or rdi, rbx; dec rcx; jnz: stores that go round the data area
LOOP = bytes.fromhex("488907 4883c708 4821d7 4809df 48ffc9 75ee")


class UnicornHook:
    """Runs a small store loop; the hook looks the sub-page of the address up in a set."""

    def __init__(self, policy: Policy) -> None:
        unicorn: Any = importlib.import_module("unicorn")
        x86: Any = importlib.import_module("unicorn.x86_const")
        denied = {
            (gfn << 5) + i
            for first, count, mask in policy.pages
            for gfn in range(first, first + count)
            for i in range(32)
            if not mask >> i & 1
        }
        self._hits = self._writes = 0
        self._registers = {
            x86.UC_X86_REG_RDI: DATA_AT,
            x86.UC_X86_REG_RDX: DATA_BYTES - 1,
            x86.UC_X86_REG_RBX: DATA_AT,
            x86.UC_X86_REG_RCX: WRITES,
        }
        self._machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._machine.mem_map(CODE_AT, 4096)
        self._machine.mem_write(CODE_AT, LOOP)
        self._machine.mem_map(DATA_AT, DATA_BYTES)

        def on_write(_machine: Any, _access: int, address: int, size: int, _value: int, _user: Any) -> None:
            self._writes += 1
            if address >> 7 in denied or (address + size - 1) >> 7 in denied:
                self._hits += 1

        self._machine.hook_add(unicorn.UC_HOOK_MEM_WRITE, on_write)

    def prepare(self) -> None:
        self._hits = self._writes = 0
        for register, value in self._registers.items():
            self._machine.reg_write(register, value)

    def run(self) -> None:
        self._machine.emu_start(CODE_AT, CODE_AT + len(LOOP))

    def check(self) -> bool:
        return self._writes == WRITES
