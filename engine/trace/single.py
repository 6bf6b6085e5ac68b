"""One guest access: a trace of one record, told in full."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.errors import InvalidValue
from engine.kvm.user_exits import UserExit
from engine.state.config import VmConfig, choices
from engine.trace import record_checks
from engine.trace.option_names import ON_VIOLATION
from engine.trace.record_checks import GPA_LIMIT
from engine.trace.results import ExitColumns

MAX_SIZE = 0xFFFF


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """``size`` bytes at ``gpa``; ``data`` are the bytes of a write, which land in guest memory if it is allowed.

    With ``gva`` and no ``gpa`` the guest's own page tables give the address. ``kind`` and ``linear`` are numbers of
    ``arch.access``: what sort of access it is and, for one by GPA, what the guest's paging would have said;
    ``circumstances`` bits of ``acc.CIRCUMSTANCES``.
    """

    gpa: int | None
    size: int = 8
    access: int = acc.WRITE
    vcpu: int = 0
    gva: int | None = None
    data: bytes | None = None
    on_violation: str = "skip"
    kind: int = acc.DATA
    linear: int = acc.LINEAR_VALID
    source: int = acc.GUEST
    insn_len: int = 0
    circumstances: int = 0

    @property
    def how(self) -> int:
        """The access as the kernels name it."""
        return acc.describe(self.access, self.kind, self.linear, self.circumstances)

    def validate(self, config: VmConfig) -> None:
        """Refuse what is no access."""
        if not 1 <= self.size <= MAX_SIZE:
            raise InvalidValue(f"must be 1 to {MAX_SIZE} bytes", field="size", value=self.size)
        if self.access not in (acc.READ, acc.WRITE, acc.EXECUTE):
            raise InvalidValue("must be 0 read, 1 write or 2 execute", field="access", value=self.access)
        choices(self.on_violation, ON_VIOLATION, "on_violation")
        self._validate_kind()
        self._validate_addresses(config.maxphyaddr)
        if self.gva is not None and not 0 <= self.gva < 1 << 64:
            raise InvalidValue("must fit in 64 bits without a sign", field="gva", value=self.gva)
        if all(v.id != self.vcpu for v in config.vcpus):
            raise InvalidValue(config.vcpu_rule, field="vcpu", value=self.vcpu)
        if self.data is not None and self.access != acc.WRITE:
            raise InvalidValue("must be left out: only a write has data", field="data", value=self.data.hex())
        if self.data is not None and len(self.data) != self.size:
            raise InvalidValue("must have as many bytes as the access", field="data", value=self.data.hex())

    def _validate_kind(self) -> None:
        if not 0 <= self.kind < len(acc.KIND_NAMES):
            raise InvalidValue(f"must be 0 to {len(acc.KIND_NAMES) - 1}", field="kind", value=self.kind)
        if not 0 <= self.linear <= acc.LINEAR_BITS:
            raise InvalidValue(f"must fit in {len(acc.LINEAR_NAMES)} bits", field="linear", value=self.linear)
        if self.circumstances & ~acc.CIRCUMSTANCES:
            raise InvalidValue(
                f"must be among {', '.join(acc.CIRCUMSTANCE_NAMES)}",
                field="circumstances",
                value=self.circumstances,
            )
        how = np.int64(self.how)
        if not record_checks.possible_kind(how):
            raise InvalidValue(acc.KIND_RULE, field="kind", value=acc.KIND_NAMES[self.kind])
        if not record_checks.possible_linear(how):
            raise InvalidValue(acc.LINEAR_RULE, field="linear", value=self.linear)
        self._validate_source()

    def _validate_source(self) -> None:
        if not 0 <= self.source < len(acc.SOURCE_NAMES):
            raise InvalidValue(f"must be 0 to {len(acc.SOURCE_NAMES) - 1}", field="source", value=self.source)
        if not record_checks.fits_source(np.int64(self.source), np.int64(self.how)):
            raise InvalidValue(acc.SOURCE_RULE, field="source", value=acc.SOURCE_NAMES[self.source])
        if self.source != acc.GUEST and self.gpa is None:
            raise InvalidValue("must be given: an access of KVM or the host is by gpa", field="gpa", value=None)
        if not 0 <= self.insn_len <= acc.MAX_INSTRUCTION:
            raise InvalidValue(f"must be 0 to {acc.MAX_INSTRUCTION} bytes", field="insn_len", value=self.insn_len)

    def _validate_addresses(self, width: int) -> None:
        if self.gpa is None:
            if self.gva is None:
                raise InvalidValue("must be given, or gva", field="gpa", value=None)
            if self.kind in (acc.PAGING_READ, acc.PAGING_UPDATE):
                raise InvalidValue(
                    "must be of an access by gpa where it is one to a guest paging structure",
                    field="kind",
                    value=acc.KIND_NAMES[self.kind],
                )
            if self.linear != acc.LINEAR_VALID:
                raise InvalidValue(
                    "must be left out: of an access by gva the guest's paging says what its page is",
                    field="linear",
                    value=self.linear,
                )
        elif self.gpa < 0 or self.gpa + self.size > min(GPA_LIMIT, 1 << width):
            raise InvalidValue(
                f"must lie within the guest-physical address width of {width} bits", field="gpa", value=self.gpa
            )

    def record(self) -> NDArray[np.uint64]:
        """The one record of an access by GPA, uint64[1, 2]."""
        what = acc.record_bits(self.kind, self.linear, self.source, self.insn_len)
        word = self.size | self.access << 16 | what | self.vcpu << 32
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
    ``gpa`` is that of the access's first byte, or of the exit that ended it, where one by linear address got so far;
    ``exception`` names what the guest takes instead, with the ``fault_address`` and, of a #PF, the ``error_code``.
    ``stale``: a cached translation decided, and the tables would have given another answer.
    """

    allowed: bool
    lands: bool
    resolution: str
    exits: ExitColumns
    run: UserExit | None
    data: bytes | None = None
    unenforced: bool = False
    gpa: int | None = None
    exception: str | None = None
    error_code: int | None = None
    fault_address: int | None = None
    stale: bool = False

    def without_effect(self) -> AccessResult:
        """The same, but no byte landed: part of the access is not in writable guest memory."""
        return replace(self, lands=False)

    def with_data(self, data: bytes) -> AccessResult:
        """The same with the bytes that a read found."""
        return replace(self, data=data)
