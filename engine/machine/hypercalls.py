"""Hypercalls of a machine's vCPUs: from registers or fields to what was flushed on which VP.

State has one home each: registers, MSRs, CPUID and what the lower hypervisor remembers of nested guests are those of
the nested state; KVM's own notes are words of the vCPU's record; queues of flushes are volatile like the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import paging
from engine.arch.hypercall import XMM_REGISTERS
from engine.cpu import frames
from engine.errors import InvalidValue
from engine.hyperv import dispatch, kvm_on_hyperv, modes, nested_paging, notes, tlb_locks
from engine.hyperv.caller import LOW, Caller
from engine.hyperv.dispatch import HypercallContext
from engine.hyperv.encode import CallFields
from engine.hyperv.flush_execution import Effect, Facts
from engine.hyperv.hypercall_exits import exit_to_l1, finish_in_guest, rip_of
from engine.hyperv.outcome import Outcome
from engine.hyperv.privileges import Privileges
from engine.hyperv.tlfs_rules import Environment
from engine.kvm.memory_views import GuestMemory
from engine.machine.hyperv_vps import enter, hyperv_host, leave, nested_guest_of, vps_of
from engine.machine.linear_width import host_width
from engine.machine.nested_states import close_vcpu, open_vcpu
from engine.machine.state import Change, Operations
from engine.machine.vcpu_operations import CachedTranslation, translation_of
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID
from engine.vcpu.vcpu import Vcpu

_CS_LONG = 1 << 13
_EFER_LMA = 1 << 10


@dataclass(frozen=True)
class HypercallRequest:
    """Registers of a hypercall, and bytes that are stored where they say that the block is.

    With ``fields`` the registers and bytes follow from them, and for a call that is not fast from ``input_gpa``.
    The caller's mode is that of the vCPU where ``cpl``, ``long_mode`` and ``protected`` are None.
    """

    registers: Caller = field(default_factory=Caller)
    input: bytes | None = None
    fields: CallFields | None = None
    input_gpa: int | None = None
    cpl: int | None = None
    long_mode: bool | None = None
    protected: bool | None = None


@dataclass(frozen=True)
class VpEffect:
    """What a flush did to one VP, by translation; see ``hyperv.flush_execution.Effect``."""

    vcpu: int
    vp_index: int
    targeted: bool
    queued: bool
    tlb_flush: int
    required: tuple[CachedTranslation, ...]
    dropped: tuple[CachedTranslation, ...]
    over_flushed: tuple[CachedTranslation, ...]
    left: tuple[CachedTranslation, ...]

    @classmethod
    def of(cls, effect: Effect) -> VpEffect:
        """An effect with its rows of the cache taken apart."""

        def entries(rows: NDArray[np.int64]) -> tuple[CachedTranslation, ...]:
            return tuple(translation_of(row) for row in rows)

        return cls(
            vcpu=effect.vp.vcpu,
            vp_index=effect.vp.vp_index,
            targeted=effect.targeted,
            queued=effect.queued,
            tlb_flush=effect.flushes,
            required=entries(effect.required),
            dropped=entries(effect.dropped),
            over_flushed=entries(effect.over_flushed),
            left=entries(effect.left),
        )


@dataclass(frozen=True)
class HypercallReport:
    """A hypercall, executed. ``rip_before`` and ``rip_after`` are the caller's."""

    outcome: Outcome
    caller: Caller
    rip_before: int
    rip_after: int

    @property
    def vps(self) -> list[VpEffect]:
        """What it did to each VP that it was sent to, or whose cache changed."""
        return [VpEffect.of(effect) for effect in self.outcome.effects]


class Hypercalls(Operations):
    """Hypercalls. ``vcpu`` is a KVM vCPU id; an unknown one raises NotFound."""

    def hypercall(self, vcpu: int, request: HypercallRequest) -> HypercallReport:
        """VMCALL or VMMCALL on a vCPU. Raises InvalidValue for input bytes that no memory can take."""
        self._config.vcpu_position(vcpu)
        request.registers.validate()
        with self._state.change() as change:
            return execute_hypercall(change, vcpu, request)


def execute_hypercall(change: Change, vcpu: int, request: HypercallRequest) -> HypercallReport:
    """VMCALL or VMMCALL on a vCPU, as a part of ``change``. Raises as ``Hypercalls.hypercall`` does."""
    position = change.config.vcpu_position(vcpu)
    whole = open_vcpu(change.config, change.nested, change.machine, vcpu)
    caller = _caller(request, whole)
    caller.validate()
    ram = GuestMemory(change)
    _place_input(_input_of(request), caller, whole, ram)
    enter(change, vcpu)
    change.ensure(frames.records(change.machine))  # each VP that is flushed notes it in its record
    outcome = _dispatch(change, whole, position, caller, ram)
    before = rip_of(whole)
    after = finish_in_guest(whole, outcome)
    if outcome.outcome in ("completed", "native"):
        notes.count(change.machine, position, ctl.V_HV_HYPERCALLS)
    if outcome.exit is not None and outcome.level == 2 and modes.in_nested_guest(whole):
        exit_to_l1(whole, ram, outcome.exit)
    change.nested = close_vcpu(change, change.nested, whole)
    leave(change, vcpu)
    return HypercallReport(outcome, caller, before, after)


def _place_input(data: bytes | None, caller: Caller, whole: Vcpu, ram: GuestMemory) -> None:
    if data is None:
        return
    if caller.control.fast:
        raise InvalidValue("must be left out: a fast call has its input in registers", field="input", value=data.hex())
    gpa: int | None = caller.input_gpa
    if gpa is not None and nested_paging.in_use(whole):
        gpa = nested_paging.translate(whole, ram, gpa)
    if gpa is None or (data and not ram.write(gpa, data)):
        raise InvalidValue("must lie in guest memory: input is stored there", field="input_gpa", value=caller.input_gpa)


def _dispatch(change: Change, whole: Vcpu, position: int, caller: Caller, ram: GuestMemory) -> Outcome:
    own = _context(change, whole, position, ram)
    host = hyperv_host(change.config)
    if host is None or own.guest is not None:
        return dispatch.hypercall(caller, own)
    guests = [kvm_on_hyperv.nested_guest(change.machine, vp.position, host) for vp in own.vps]
    exact = change.config.flush_execution or "exact"
    below = replace(
        own,
        privileges=host.privileges,
        partition_memory=kvm_on_hyperv.HostPages(change.machine),
        vps=[replace(vp, nested_ids=(g.vm_id, g.vp_id)) for vp, g in zip(own.vps, guests, strict=True)],
        policy="tlfs",
        facts=replace(own.facts, execution="exact" if exact == "kvm" else exact),
        guest=guests[position],
        l0="hyperv",
        tagged=False,
    )
    return dispatch.hypercall_on_hyperv(caller, below, own)


def _context(change: Change, whole: Vcpu, position: int, ram: GuestMemory) -> HypercallContext:
    m, config = change.machine, change.config
    enforced = notes.flag(m, position, notes.ENFORCE_CPUID)
    privileges = Privileges.of(whole.cpuid, whole.msrs.get(HV_GUEST_OS_ID, 0), enforced=enforced)
    vps = vps_of(config, m, change.nested)
    vps[position] = replace(vps[position], running=True)
    nested = modes.in_nested_guest(whole)
    width = host_width(config, m, change.nested)
    return HypercallContext(
        machine=m,
        memory=ram,
        partition_memory=ram,
        privileges=privileges,
        vps=vps,
        policy=config.flush_policy,
        environment=Environment(width, config.maxphyaddr, whole.host.nested),
        facts=Facts.of(config, width),
        guest=nested_guest_of(whole, ram) if nested else None,
        translate=(lambda gpa: nested_paging.translate(whole, ram, gpa)) if nested_paging.in_use(whole) else None,
        locked=tlb_locks.locked(m, vps, position),
    )


def _caller(request: HypercallRequest, whole: Vcpu) -> Caller:
    """The registers, in the mode asked for or in that of the vCPU."""
    registers = whole.registers
    long_mode = bool(registers["ia32_efer"] & _EFER_LMA and registers["cs_ar_bytes"] & _CS_LONG)
    protected = bool(registers["cr0"] & paging.CR0_PE)
    cpl = registers["ss_ar_bytes"] >> 5 & 3 if protected else 0
    long_mode = long_mode if request.long_mode is None else request.long_mode
    return replace(
        request.registers if request.fields is None else _registers_of(request.fields, request.input_gpa, long_mode),
        long_mode=long_mode,
        protected=protected if request.protected is None else request.protected,
        cpl=cpl if request.cpl is None else request.cpl,
    )


def _registers_of(fields: CallFields, input_gpa: int | None, long_mode: bool) -> Caller:
    """Registers with a call given by its fields."""
    control = fields.control()
    if fields.fast:
        first, second, xmm = fields.fast_registers()
    elif input_gpa is None:
        raise InvalidValue(
            "must be given: a call that is not fast has its block in guest memory", field="input_gpa", value=None
        )
    else:
        first, second, xmm = input_gpa, 0, (0,) * XMM_REGISTERS
    if long_mode:
        return Caller(rcx=control, rdx=first, r8=second, xmm=xmm)
    return Caller(
        rdx=control >> 32,
        rax=control & LOW,
        rbx=first >> 32,
        rcx=first & LOW,
        rdi=second >> 32,
        rsi=second & LOW,
        xmm=xmm,
    )


def _input_of(request: HypercallRequest) -> bytes | None:
    """The bytes to be stored: those given, or the block of a call given by its fields."""
    if request.input is not None or request.fields is None or request.fields.fast:
        return request.input
    return request.fields.block()
