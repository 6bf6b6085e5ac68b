"""A guest with one program of stores and a user space that runs it, as the series' selftest does (kvm-spp 7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx2

LENGTH = 7  # movl $0x99, disp(%reg)
VALUE = "99000000"
STRIDE = 128


@dataclass
class Guest:
    """A vCPU whose program is ``loops`` loops of 32 stores over a page; it leaves to user space after each loop.

    ``rip`` counts bytes of the program. The service executes single accesses: where the guest is afterwards follows
    from what KVM_RUN says.
    """

    client: httpx2.Client
    url: str
    page: int
    loops: int = 1
    vcpu: int = 0
    rip: int = 0
    exits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def _program(self) -> list[int | None]:
        one_loop: list[int | None] = [self.page + STRIDE * i for i in range(32)]
        return [*one_loop, None] * self.loops

    def run(self) -> str:
        """KVM_RUN: the name of the exit, KVM_EXIT_IO at the end of a loop."""
        while True:
            where = self._program[self.rip // LENGTH]
            if where is None:
                self.rip += LENGTH
                return "KVM_EXIT_IO"
            outcome = self._store(where)
            run = outcome["run"]
            if run is None or run["rip_advanced"]:
                self.rip += LENGTH
            if run is not None:
                self.exits.append(run)
                return str(run["name"])

    def skip(self) -> None:
        """What user space of the later series does with an exit: RIP += insn_len."""
        self.rip += LENGTH

    def _store(self, gpa: int) -> dict[str, Any]:
        body = {"gpa": gpa, "size": 4, "access": "write", "data": VALUE, "vcpu": self.vcpu}
        reply = self.client.post(f"{self.url}/accesses", json=body)
        assert reply.status_code == 200, reply.text
        outcome: dict[str, Any] = reply.json()
        return outcome
