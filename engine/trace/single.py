"""One guest access: a trace of one record, told in full."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.config import VmConfig
from engine.errors import InvalidValue
from engine.kvm import resolutions as res
from engine.kvm.user_exits import UserExit, user_exit
from engine.trace.replay import GPA_LIMIT
from engine.trace.results import ExitColumns, TraceResult

MAX_SIZE = 0xFFFF


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """``size`` bytes at ``gpa``; ``data`` are the bytes of a write, which land in guest memory if it is allowed.

    ``kind`` and the bits of ``linear`` are those of ``arch.access``.
    """

    gpa: int
    size: int = 8
    access: int = acc.WRITE
    vcpu: int = 0
    gva: int | None = None
    data: bytes | None = None
    on_violation: str = "skip"
    kind: int = acc.DATA
    linear: int = acc.LINEAR_VALID

    @property
    def how(self) -> int:
        """The access as the kernels name it."""
        return acc.describe(self.access, self.kind, self.linear)

    def validate(self, config: VmConfig) -> None:
        """Refuse what is no access."""
        if not 1 <= self.size <= MAX_SIZE:
            raise InvalidValue(f"an access has 1 to {MAX_SIZE} bytes", field="size", value=self.size)
        if self.access not in (acc.READ, acc.WRITE, acc.EXECUTE):
            raise InvalidValue("access is 0 read, 1 write or 2 execute", field="access", value=self.access)
        if not 0 <= self.kind < len(acc.KIND_NAMES):
            raise InvalidValue(f"kind is 0 to {len(acc.KIND_NAMES) - 1}", field="kind", value=self.kind)
        if self.kind != acc.DATA and self.access == acc.EXECUTE:
            raise InvalidValue("only a data access executes", field="kind", value=acc.KIND_NAMES[self.kind])
        if not 0 <= self.linear < 1 << len(acc.LINEAR_NAMES):
            raise InvalidValue(f"linear has {len(acc.LINEAR_NAMES)} bits", field="linear", value=self.linear)
        width = config.maxphyaddr
        if self.gpa < 0 or self.gpa + self.size > min(GPA_LIMIT, 1 << width):
            raise InvalidValue(
                f"an access lies within the guest-physical address width of {width} bits", field="gpa", value=self.gpa
            )
        if self.gva is not None and not 0 <= self.gva < 1 << 64:
            raise InvalidValue("a linear address has 64 bits", field="gva", value=self.gva)
        if all(v.id != self.vcpu for v in config.vcpus):
            raise InvalidValue("the machine has a vCPU of that id", field="vcpu", value=self.vcpu)
        if self.data is not None and self.access != acc.WRITE:
            raise InvalidValue("only a write has data", field="data", value=self.data.hex())
        if self.data is not None and len(self.data) != self.size:
            raise InvalidValue("data has as many bytes as the access", field="data", value=self.data.hex())

    def record(self) -> NDArray[np.uint64]:
        """The one record, uint64[1, 2]."""
        word = self.size | self.access << 16 | self.vcpu << 32
        return np.array([[self.gpa, word]], dtype=np.uint64)

    def gvas(self) -> NDArray[np.uint64] | None:
        """The linear address as a column."""
        return None if self.gva is None else np.array([self.gva], dtype=np.uint64)


@dataclass(frozen=True)
class AccessResult:
    """``allowed``: the processor let it through. ``lands``: a write took effect, allowed or by the caller's choice.

    ``resolution`` is how it ended; ``exits`` every exit on the way; ``run`` what user space sees, None if nothing.
    ``unenforced``: a write that a map refuses went through all the same, as it does in a larger page that the first
    series maps.
    """

    allowed: bool
    lands: bool
    resolution: str
    exits: ExitColumns
    run: UserExit | None
    data: bytes | None = None
    unenforced: bool = False

    def without_effect(self) -> AccessResult:
        """The same, but no byte landed: part of the access is not in writable guest memory."""
        return replace(self, lands=False)

    def with_data(self, data: bytes) -> AccessResult:
        """The same with the bytes that a read found."""
        return replace(self, data=data)


def access_result(request: AccessRequest, result: TraceResult, profile: str, *, granted: bool) -> AccessResult:
    """Read the outcome of a one-record replay that listed every exit; ``granted``: a grant opened what it needs."""
    exits = result.exit_columns
    ended = np.flatnonzero(exits.column("resolution") > res.LAST_INTERNAL)  # after a grant, KVM maps the page anew
    ending = int(ended[-1]) if len(ended) else -1
    last = int(exits.column("resolution")[ending]) if len(ended) else res.COMPLETED
    allowed = last == res.COMPLETED or (granted and last == res.VIOLATION)
    lands = allowed or (last == res.VIOLATION and request.on_violation == "allow")
    run = None
    if last != res.COMPLETED:
        reason, gpa, qualification = (int(exits.column(name)[ending]) for name in ("reason", "gpa", "qualification"))
        run = user_exit(last, reason, gpa, profile, qualification=qualification)
    return AccessResult(
        allowed, lands, res.RESOLUTION_NAMES[last], exits, run, unenforced=result.unenforced_writes != 0
    )
