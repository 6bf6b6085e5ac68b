"""Operations on one vCPU's processor: its VMCS, VM entry, INVEPT and INVVPID, its translation cache, its MSRs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept, exceptions
from engine.arch.vmcs_fields import FIELDS
from engine.arch.words import signed, unsigned
from engine.cpu import control_checks, frames, invalidate, tlb
from engine.errors import InvalidValue, Unsupported
from engine.machine.linear_width import invvpid_width
from engine.machine.nested_states import record_of
from engine.machine.state import Change, Operations
from engine.vcpu.control_registers import vmcs_takes_cr4

# Where INVEPT and INVVPID are executed, by position as ``cpu.invalidate`` numbers it.
PLACES = ("root", "outside", "non-root", "wrong-mode")

IA32_VMX_PROCBASED_CTLS2 = 0x48B
IA32_VMX_EPT_VPID_CAP = 0x48C
IA32_VMX_PROCBASED_CTLS3 = 0x492

_KINDS = {int(tlb.PHYSICAL): "physical", int(tlb.COMBINED): "combined", int(tlb.LINEAR): "linear"}


@dataclass(frozen=True, slots=True)
class InstructionResult:
    """How VM entry, INVEPT or INVVPID ended.

    ``result`` is VMsucceed, VMfail, exception or vm-exit; of the others the one that belongs to it is not None.
    """

    result: str
    vm_instruction_error: int | None = None
    exception: str | None = None
    exit_reason: int | None = None


@dataclass(frozen=True, slots=True)
class CachedTranslation:
    """One entry of a translation cache.

    ``address`` is the page's linear address, or its GPA for a physical entry, which has no ``vpid`` and ``pcid``; a
    linear entry has no ``ept_root``. ``address_space`` are the page tables that gave a linear address's translation;
    ``vm_id`` and ``vp_id`` name the nested guest that it was made for, None for a guest's own. The rights are the AND
    over the EPT entries used, ``leaf`` the last of them at ``ept_level``; ``spp_vector`` is the sub-page vector if one
    was read. ``page_bits`` is log2 of the guest's page.
    """

    kind: str
    vpid: int | None
    pcid: int | None
    is_global: bool
    ept_root: int | None
    nested: int
    vm_id: int | None
    vp_id: int | None
    address_space: int | None
    address: int
    gpa: int
    page_bits: int
    readable: bool
    writable: bool
    executable: bool
    user_executable: bool
    ept_level: int
    leaf: int
    spp_vector: int | None


@dataclass(frozen=True, slots=True)
class Msr:
    """A capability MSR."""

    index: int
    name: str
    value: int


class VcpuOperations(Operations):
    """What can be done to one vCPU. ``vcpu`` is always a KVM vCPU id; an unknown one raises NotFound.

    All but ``tlb`` raise Unsupported on a host without VMX.
    """

    def vmcs(self, vcpu: int) -> dict[str, int]:
        """Every field of ``arch.vmcs_fields`` by name."""
        frame = self._frame(vcpu)
        snapshot = self._published
        machine = snapshot.machine
        row = machine.rows[machine.row_of[frame]]
        return {name: unsigned(row[field.word]) for name, field in FIELDS.items()}

    def set_vmcs(self, vcpu: int, fields: Mapping[str, int]) -> None:
        """Replace the fields given, all or none. Any value that fits is stored; VM entry is what checks it.

        CR4.LA57 is the exception: see ``vcpu.control_registers``.
        """
        frame = self._frame(vcpu)
        for name, value in fields.items():
            if name not in FIELDS:
                raise InvalidValue(f"a field is one of {', '.join(FIELDS)}", field=name, value=value)
            bits = FIELDS[name].bits
            if not 0 <= value < 1 << bits:
                raise InvalidValue(f"{name} has {bits} bits", field=name, value=value)
        with self._state.change() as draft:
            cpuid = record_of(draft.config, draft.nested, vcpu).cpuid
            if not vmcs_takes_cr4(cpuid, fields.get("cr4", 0)):
                rule = "LA57 (bit 12) needs the vCPU's CPUID.7:ECX bit 16"
                raise InvalidValue(rule, field="cr4", value=fields["cr4"])
            for name, value in fields.items():
                frames.write_word(draft.machine, frame, FIELDS[name].word, signed(value))

    def vm_entry(self, vcpu: int) -> InstructionResult:
        """VM entry: the checks on the controls, and what entering removes from the translation cache."""
        position = self._frame(vcpu) - int(frames.FIRST_VCPU_FRAME)
        with self._state.change() as draft:
            error = int(control_checks.vm_entry(draft.machine, position))
            if error:
                return InstructionResult("VMfail", vm_instruction_error=error)
            tlb.transition(draft.machine, position)
        return InstructionResult("VMsucceed")

    def invept(self, vcpu: int, kind: int, eptp: int, *, place: str = "root", cpl: int = 0) -> InstructionResult:
        """INVEPT on the processor of a vCPU; ``place`` is one of PLACES, ``kind`` the type (64 bits)."""
        with self._instruction(vcpu, place, cpl, {"type": kind, "eptp": eptp}) as (draft, position, where):
            outcome, number = invalidate.invept(draft.machine, position, where, cpl, signed(kind), signed(eptp))
        return _result(int(outcome), int(number))

    def invvpid(
        self, vcpu: int, kind: int, descriptor: int, linear_address: int, *, place: str = "root", cpl: int = 0
    ) -> InstructionResult:
        """INVVPID on the processor of a vCPU; ``descriptor`` is its first half: the VPID and 48 reserved bits."""
        given = {"type": kind, "descriptor": descriptor, "linear_address": linear_address}
        with self._instruction(vcpu, place, cpl, given) as (draft, position, where):
            width = invvpid_width(draft.config, draft.machine, draft.nested, position)
            outcome, number = invalidate.invvpid(
                draft.machine, position, where, cpl, signed(kind), signed(descriptor), signed(linear_address), width
            )
        return _result(int(outcome), int(number))

    def tlb(self, vcpu: int) -> list[CachedTranslation]:
        """What the vCPU's translation cache holds, by kind and address; nothing where none is modelled."""
        position = self._config.vcpu_position(vcpu)
        snapshot = self._published
        table = snapshot.machine.tlb
        if not len(table):
            return []
        live = table[1:, tlb.E_GENERATION] == table[0, tlb.GENERATION]
        own = table[1:, tlb.E_KIND] >> tlb.VCPU_SHIFT == position
        found = [translation_of(row) for row in table[1:][live & own]]
        return sorted(found, key=lambda item: (item.kind, item.address, item.ept_root or 0, item.vpid or 0))

    def msrs(self, vcpu: int) -> list[Msr]:
        """The VMX capability MSRs that the model goes by."""
        self._frame(vcpu)
        host = self._config.host
        must = host.capability("procbased_ctls2") & 0xFFFF_FFFF
        return [
            Msr(IA32_VMX_PROCBASED_CTLS2, "IA32_VMX_PROCBASED_CTLS2", host.secondary_allowed << 32 | must),
            Msr(IA32_VMX_EPT_VPID_CAP, "IA32_VMX_EPT_VPID_CAP", host.capability("ept_vpid_cap")),
            Msr(IA32_VMX_PROCBASED_CTLS3, "IA32_VMX_PROCBASED_CTLS3", host.capability("procbased_ctls3")),
        ]

    def _frame(self, vcpu: int) -> int:
        """Frame of the vCPU's record."""
        position = self._config.vcpu_position(vcpu)
        if self._config.host.vendor != "intel":
            raise Unsupported("a VMCS needs an Intel host", field="host.vendor", value=self._config.host.vendor)
        return int(frames.FIRST_VCPU_FRAME) + position

    @contextmanager
    def _instruction(
        self, vcpu: int, place: str, cpl: int, operands: Mapping[str, int]
    ) -> Iterator[tuple[Change, int, int]]:
        position = self._frame(vcpu) - int(frames.FIRST_VCPU_FRAME)
        if place not in PLACES:
            raise InvalidValue(f"place is one of {', '.join(PLACES)}", field="place", value=place)
        if not 0 <= cpl <= 3:
            raise InvalidValue("cpl is 0 to 3", field="cpl", value=cpl)
        for name, value in operands.items():
            if not 0 <= value < 1 << 64:
                raise InvalidValue(f"{name} has 64 bits", field=name, value=value)
        with self._state.change() as draft:
            yield draft, position, PLACES.index(place)


def _result(outcome: int, number: int) -> InstructionResult:
    name = invalidate.OUTCOME_NAMES[outcome]
    if outcome == invalidate.FAILED:
        return InstructionResult(name, vm_instruction_error=number)
    if outcome == invalidate.EXCEPTION:
        vector = exceptions.NAMES[number]
        return InstructionResult(name, exception=f"{vector}(0)" if number == exceptions.GENERAL_PROTECTION else vector)
    if outcome == invalidate.EXIT:
        return InstructionResult(name, exit_reason=number)
    return InstructionResult(name)


def translation_of(row: NDArray[np.int64]) -> CachedTranslation:
    """A row of the translation cache by its parts."""

    def word(position: np.int64) -> int:
        return int(row[position])

    kind = word(tlb.E_KIND) & tlb.KIND_MASK
    space, rights, facts = word(tlb.E_SPACE), word(tlb.E_RIGHTS), word(tlb.E_FACTS)
    physical = kind == tlb.PHYSICAL
    nested = unsigned(word(tlb.E_NESTED))
    return CachedTranslation(
        kind=_KINDS[kind],
        vpid=None if physical else space & ctl.VPID_MASK,
        pcid=None if physical else space >> tlb.PCID_SHIFT,
        is_global=bool(facts & tlb.GUEST_GLOBAL),
        ept_root=None if kind == tlb.LINEAR else word(tlb.E_ROOT),
        nested=nested,
        vm_id=unsigned(word(tlb.E_NESTED_VM)) if nested else None,
        vp_id=nested >> ctl.NESTED_VP_SHIFT if nested else None,
        address_space=None if physical else word(tlb.E_ADDRESS_SPACE),
        address=unsigned(word(tlb.E_PAGE) << 12),
        gpa=unsigned(word(tlb.E_FRAME) << 12),
        page_bits=facts >> tlb.GUEST_SIZE_AT & tlb.GUEST_SIZE_MASK,
        readable=bool(rights & ept.READ),
        writable=bool(rights & ept.WRITE),
        executable=bool(rights & ept.EXECUTE),
        user_executable=bool(rights & ept.USER_EXECUTE),
        ept_level=rights >> tlb.LEVEL_SHIFT & 15,
        leaf=unsigned(word(tlb.E_LEAF)),
        spp_vector=unsigned(word(tlb.E_VECTOR)) if facts & tlb.VECTOR_READ else None,
    )
