"""Hypercalls and everything of Hyper-V around them: ``vm.hyperv``.

State has one home each: registers, MSRs, CPUID and what the lower hypervisor remembers of nested guests are those of
the nested state; KVM's own notes are words of the vCPU's record; queues of flushes are volatile like the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import paging
from engine.arch.evmcs import EVMCS
from engine.arch.hypercall import XMM_REGISTERS
from engine.arch.hyperv_pages import DIRECT_HYPERCALL, PARTITION_ASSIST, VP_ASSIST, VP_ASSIST_SIZE
from engine.config import VmConfig
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine
from engine.errors import InvalidValue, NotFound, Unsupported
from engine.hyperv import dispatch, execution, modes, nested_paging, notes, on_hyperv, queues
from engine.hyperv.caller import LOW, Caller
from engine.hyperv.direct import NestedGuest
from engine.hyperv.dispatch import Situation
from engine.hyperv.encode import CallFields
from engine.hyperv.execution import Effect, Facts, Vp
from engine.hyperv.exits import exit_to_l1, finish_in_guest, rip_of
from engine.hyperv.outcome import Outcome
from engine.hyperv.privileges import Privileges
from engine.hyperv.tlfs_rules import Environment
from engine.nested.enlightened import asks_for_direct_flush
from engine.nested.msr_numbers import HV_GUEST_OS_ID, HV_VP_ASSIST_PAGE
from engine.nested.vcpu import NestedVcpu
from engine.nested_states import NestedStates, close_vcpu, first_identity, open_vcpu
from engine.ram import Ram
from engine.store import Draft, Snapshot
from engine.trace.columns import TraceChunk
from engine.vcpus import CachedTranslation, translation_of

ACTIVITIES = ("running", "halted")
_LA57, _LA48 = 57, 48
_CS_LONG = 1 << 13
_EFER_LMA = 1 << 10
_ASSIST_ENABLED = 1


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
    """What a flush did to one VP, by translation; see ``hyperv.execution.Effect``."""

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


@dataclass(frozen=True)
class FlushQueue:
    """What a vCPU has still to flush, for its guest and for its nested guest, and KVM's statistics."""

    own: tuple[int, ...]
    nested: tuple[int, ...]
    requested: bool
    flushes: int
    hypercalls: int


@dataclass(frozen=True)
class PartitionVp:
    """A nested VP as the lower hypervisor has recorded it, and the vCPU (its L1 VP) that ran it last."""

    vcpu: int
    vp_index: int
    vm_id: int
    vp_id: int
    partition_assist_page: int
    tlb_lock_count: int | None
    asks: bool
    direct: bool
    running: bool


class HypervOperations:
    """Hyper-V. ``vcpu`` is a KVM vCPU id; an unknown one raises NotFound."""

    def __init__(
        self,
        config: VmConfig,
        published: Callable[[], tuple[Snapshot, NestedStates]],
        change: Callable[[], AbstractContextManager[Draft]],
    ) -> None:
        self._config = config
        self._published = published
        self._change = change

    # Hypercalls

    def hypercall(self, vcpu: int, request: HypercallRequest) -> HypercallReport:
        """VMCALL or VMMCALL on a vCPU. Raises InvalidValue for input bytes that no memory can take."""
        position = self._position(vcpu)
        request.registers.validate()
        with self._change() as draft:
            whole = open_vcpu(self._config, draft.beside, draft.machine, vcpu)
            caller = _caller(request, whole)
            caller.validate()
            ram = Ram(draft)
            self._place_input(_input_of(request), caller, whole, ram)
            draft.ensure()
            enter(draft, self._config, vcpu)
            outcome = self._dispatch(draft, whole, position, caller, ram)
            before = rip_of(whole)
            after = finish_in_guest(whole, outcome)
            if outcome.outcome in ("completed", "native"):
                notes.count(draft.machine, position, ctl.V_HV_HYPERCALLS)
            if outcome.exit is not None and outcome.level == 2 and modes.in_nested_guest(whole):
                exit_to_l1(whole, ram, outcome.exit)
            draft.beside = close_vcpu(draft, draft.beside, whole)
            leave(draft, self._config, vcpu)
        return HypercallReport(outcome, caller, before, after)

    def _place_input(self, data: bytes | None, caller: Caller, whole: NestedVcpu, ram: Ram) -> None:
        if data is None:
            return
        if caller.control.fast:
            raise InvalidValue("a fast call has its input in registers", field="input", value=data.hex())
        gpa: int | None = caller.input_gpa
        if gpa is not None and nested_paging.in_use(whole):
            gpa = nested_paging.translate(whole, ram, gpa)
        if gpa is None or (data and not ram.write(gpa, data)):
            raise InvalidValue("input goes to guest memory", field="input_gpa", value=caller.input_gpa)

    def _dispatch(self, draft: Draft, whole: NestedVcpu, position: int, caller: Caller, ram: Ram) -> Outcome:
        own = self._situation(draft, whole, position, ram)
        host = hyperv_host(self._config)
        if host is None or own.guest is not None:
            return dispatch.hypercall(caller, own)
        guests = [on_hyperv.nested_guest(draft.machine, vp.position, host) for vp in own.vps]
        exact = self._config.flush_execution or "exact"
        below = replace(
            own,
            privileges=host.privileges,
            partition_memory=on_hyperv.HostPages(draft.machine),
            vps=[replace(vp, nested_ids=(g.vm_id, g.vp_id)) for vp, g in zip(own.vps, guests, strict=True)],
            policy="tlfs",
            facts=replace(own.facts, execution="exact" if exact == "kvm" else exact),
            guest=guests[position],
            l0="hyperv",
            tagged=False,
        )
        return dispatch.hypercall_on_hyperv(caller, below, own)

    def _situation(self, draft: Draft, whole: NestedVcpu, position: int, ram: Ram) -> Situation:
        m = draft.machine
        enforced = notes.flag(m, position, notes.ENFORCE_CPUID)
        privileges = Privileges.of(whole.cpuid, whole.msrs.get(HV_GUEST_OS_ID, 0), enforced=enforced)
        vps = _vps(self._config, m, draft.beside)
        vps[position] = replace(vps[position], running=True)
        nested = modes.in_nested_guest(whole)
        width = self._config.maxphyaddr
        return Situation(
            machine=m,
            memory=ram,
            partition_memory=ram,
            privileges=privileges,
            vps=vps,
            policy=self._config.flush_policy,
            environment=Environment(_linear_width(whole), width, whole.host.nested),
            facts=facts_of(self._config, _linear_width(whole)),
            guest=_nested_guest(whole, ram) if nested else None,
            translate=(lambda gpa: nested_paging.translate(whole, ram, gpa)) if nested_paging.in_use(whole) else None,
            locked=frozenset(
                vp.position for vp in vps if vp.position != position and notes.flag(m, vp.position, notes.TLB_LOCKED)
            ),
        )

    # Queues and what a vCPU does

    def flush_queue(self, vcpu: int) -> FlushQueue:
        """What the vCPU has still to flush."""
        position = self._position(vcpu)
        m = self._published()[0].machine
        return FlushQueue(
            own=queues.contents(m.queues, position, queues.OWN_QUEUE),
            nested=queues.contents(m.queues, position, queues.NESTED_QUEUE),
            requested=queues.requested(m.queues, position),
            flushes=notes.statistic(m, position, ctl.V_HV_FLUSHES),
            hypercalls=notes.statistic(m, position, ctl.V_HV_HYPERCALLS),
        )

    def service(self, vcpu: int, *, full: bool = False) -> FlushQueue:
        """What the vCPU does before it enters its guest; ``full``: after an unrelated flush of its whole context."""
        position = self._position(vcpu)
        with self._change() as draft:
            if full:
                nested = bool(frames.read_word(draft.machine, FIRST_VCPU_FRAME + position, ctl.V_GUEST_MODE))
                execution.full_flush(draft.machine, position, nested)
            enter(draft, self._config, vcpu)
        return self.flush_queue(vcpu)

    def activity(self, vcpu: int) -> str:
        """``running`` in its guest, or ``halted``."""
        halted = notes.flag(self._published()[0].machine, self._position(vcpu), notes.HALTED)
        return ACTIVITIES[halted]

    def set_activity(self, vcpu: int, activity: str) -> None:
        """Halt a vCPU, or let it run: then it first does what was queued for it."""
        position = self._position(vcpu)
        if activity not in ACTIVITIES:
            raise InvalidValue(f"is one of {', '.join(ACTIVITIES)}", field="activity", value=activity)
        with self._change() as draft:
            notes.set_flag(draft.machine, position, notes.HALTED, activity == "halted")
            if activity == "running":
                enter(draft, self._config, vcpu)

    def tlb_locked(self, vcpu: int) -> bool:
        """Whether the vCPU's TLB is locked: flushes of it suspend their callers."""
        return notes.flag(self._published()[0].machine, self._position(vcpu), notes.TLB_LOCKED)

    def set_tlb_lock(self, vcpu: int, locked: bool) -> None:
        """Take or release the TLB lock of a vCPU."""
        position = self._position(vcpu)
        with self._change() as draft:
            notes.set_flag(draft.machine, position, notes.TLB_LOCKED, locked)

    # Pages and partitions

    def vp_assist_page(self, vcpu: int, *, of_kvm: bool = False) -> bytes:
        """The VP assist page of the guest, or that of KVM where it runs on Hyper-V. Raises NotFound without one."""
        position = self._position(vcpu)
        snapshot, _ = self._published()
        if of_kvm:
            if hyperv_host(self._config) is None:
                raise NotFound("KVM has one where it runs on Hyper-V", field="of", value="kvm")
            return on_hyperv.page_of(snapshot.machine, position, VP_ASSIST)
        page = Ram(snapshot).read(self._assist_gpa(vcpu), VP_ASSIST_SIZE)
        if page is None:
            raise NotFound("the guest's VP assist page is in guest memory", field="vcpu", value=vcpu)
        return page

    def set_vp_assist_page(self, vcpu: int, data: bytes) -> None:
        """Store the first bytes of the guest's VP assist page, as its kernel would."""
        if len(data) > VP_ASSIST_SIZE:
            raise InvalidValue(f"the page has {VP_ASSIST_SIZE} bytes in use", field="body", value=len(data))
        gpa = self._assist_gpa(vcpu)
        with self._change() as draft:
            if data and not Ram(draft).write(gpa, data):
                raise NotFound("the guest's VP assist page is in guest memory", field="vcpu", value=vcpu)

    def evmcs_of_kvm(self, vcpu: int) -> bytes:
        """The enlightened VMCS that KVM itself uses for the vCPU on Hyper-V. Raises NotFound without one."""
        position = self._position(vcpu)
        if hyperv_host(self._config) is None:
            raise NotFound("KVM uses one where it runs on Hyper-V", field="of", value="kvm")
        return on_hyperv.page_of(self._published()[0].machine, position, EVMCS)

    def partitions(self) -> list[PartitionVp]:
        """Nested VPs by the vCPU that ran them last; vCPUs that ran none have ids of 0."""
        snapshot, states = self._published()
        host = hyperv_host(self._config)
        return [self._partition_vp(snapshot, states, vp, host) for vp in _vps(self._config, snapshot.machine, states)]

    def _partition_vp(
        self, snapshot: Snapshot, states: NestedStates, vp: Vp, host: on_hyperv.HypervHost | None
    ) -> PartitionVp:
        memory: Ram | on_hyperv.HostPages = Ram(snapshot)
        if host is None:
            whole = open_vcpu(self._config, states, snapshot.machine, vp.vcpu)
            guest, running = _nested_guest(whole, Ram(snapshot)), modes.in_nested_guest(whole)
        else:
            memory = on_hyperv.HostPages(snapshot.machine)
            guest, running = on_hyperv.nested_guest(snapshot.machine, vp.position, host), vp.running
        page = memory.read(guest.assist_page, 4)
        return PartitionVp(
            vcpu=vp.vcpu,
            vp_index=vp.vp_index,
            vm_id=guest.vm_id,
            vp_id=guest.vp_id,
            partition_assist_page=guest.assist_page,
            tlb_lock_count=None if page is None else PARTITION_ASSIST.get(page, "tlb_lock_count"),
            asks=guest.asks,
            direct=guest.direct,
            running=running,
        )

    def _assist_gpa(self, vcpu: int) -> int:
        self._position(vcpu)
        snapshot, states = self._published()
        where = open_vcpu(self._config, states, snapshot.machine, vcpu).msrs.get(HV_VP_ASSIST_PAGE, 0)
        if not where & _ASSIST_ENABLED:
            raise NotFound("the guest has enabled its VP assist page, MSR 0x40000073", field="vcpu", value=vcpu)
        return where & ~0xFFF

    # Capabilities

    def direct_flush_available(self) -> bool:
        """KVM_CHECK_EXTENSION(175)."""
        host = hyperv_host(self._config)
        return host is not None and host.direct_flush

    def direct_flush_enabled(self, vcpu: int) -> bool:
        """Whether KVM_CAP_HYPERV_DIRECT_TLBFLUSH is enabled on the vCPU."""
        return notes.flag(self._published()[0].machine, self._position(vcpu), notes.DIRECT_FLUSH)

    def direct_flush_fields(self, vcpu: int) -> dict[str, str]:
        """What enabling it stored in the vCPU's enlightened VMCS, and whether the guest's CPUID hides KVM.

        It has to: Hyper-V looks at RCX only, where a hypercall of KVM's own has its second argument.
        """
        page = self.evmcs_of_kvm(vcpu)
        names = ("hv_enlightenments_control", "hv_vp_id", "hv_vm_id", "partition_assist_page", "hv_clean_fields")
        snapshot, states = self._published()
        hides = not open_vcpu(self._config, states, snapshot.machine, vcpu).shows_kvm
        return {**{name: hex(EVMCS.get(page, name)) for name in names}, "hides_kvm": hex(hides)}

    def enforces_cpuid(self, vcpu: int) -> bool:
        """Whether KVM_CAP_HYPERV_ENFORCE_CPUID is enabled on the vCPU."""
        return notes.flag(self._published()[0].machine, self._position(vcpu), notes.ENFORCE_CPUID)

    def enable_direct_flush(self, vcpu: int) -> None:
        """KVM_ENABLE_CAP(175). Raises Unsupported with the kernel's errno, and then nothing has changed."""
        position = self._position(vcpu)
        host = hyperv_host(self._config)
        with self._change() as draft:
            errno = "ENOTTY" if host is None else on_hyperv.enable_direct_flush(draft.machine, position, host)
            if errno is not None:
                raise Unsupported(
                    "KVM runs on a Hyper-V that serves flushes of nested guests, and there is memory",
                    field="capability",
                    value=on_hyperv.CAP_DIRECT_FLUSH,
                    errno=errno,
                )

    def enforce_cpuid(self, vcpu: int, enforced: bool) -> None:
        """KVM_ENABLE_CAP(199): whether hypercalls need what CPUID says."""
        position = self._position(vcpu)
        with self._change() as draft:
            notes.set_flag(draft.machine, position, notes.ENFORCE_CPUID, enforced)

    def _position(self, vcpu: int) -> int:
        for position, item in enumerate(self._config.vcpus):
            if item.id == vcpu:
                return position
        raise NotFound("the machine has a vCPU of that id", field="vcpu", value=vcpu)


def hyperv_host(config: VmConfig) -> on_hyperv.HypervHost | None:
    """The Hyper-V under KVM, None where there is none."""
    if config.host.hyperv is None:
        return None
    return on_hyperv.HypervHost.of(config.host.hyperv, enlightened=config.host.evmcs is not False)


def facts_of(config: VmConfig, width: int = _LA48) -> Facts:
    """How the machine executes flushes."""
    return Facts(config.executes_flushes, width, config.host.ept)


def enter(draft: Draft, config: VmConfig, vcpu: int) -> None:
    """A vCPU is about to run its guest: it does what was queued for it. One that the machine has not does nothing."""
    m = draft.machine
    position = int(m.vcpu_of_id[vcpu]) if vcpu < len(m.vcpu_of_id) else -1
    if position >= 0 and queues.requested(m.queues, position):
        draft.ensure()
        m = draft.machine
        frame = FIRST_VCPU_FRAME + position
        wide = bool(int(frames.read_word(m, frame, ctl.V_CR4)) & paging.CR4_LA57)
        nested = bool(frames.read_word(m, frame, ctl.V_GUEST_MODE))
        execution.service(m, position, nested, facts_of(config, _LA57 if wide else _LA48))


def leave(draft: Draft, config: VmConfig, vcpu: int) -> None:
    """A vCPU has run its guest: on Hyper-V, KVM notes its VP id after the exit."""
    host = hyperv_host(config)
    if host is not None and host.evmcs:
        draft.ensure()
        position = int(draft.machine.vcpu_of_id[vcpu])
        index = _identity(config, draft.beside, vcpu)
        on_hyperv.exited(draft.machine, position, index)


class Runs:
    """The vCPUs that a trace runs: each does what was queued for it before its first access of a chunk."""

    def __init__(self, draft: Draft, config: VmConfig) -> None:
        self._draft = draft
        self._config = config
        self._on_hyperv = config.host.hyperv is not None
        self._ran: set[int] = set()

    def __call__(self, chunk: TraceChunk) -> None:
        """A chunk is about to be replayed."""
        m = self._draft.machine
        if not self._on_hyperv and not any(queues.requested(m.queues, at) for at in range(len(self._config.vcpus))):
            return
        vcpus = {int(vcpu) for vcpu in np.unique(chunk.records[:, 1] >> np.uint64(32) & np.uint64(0xFFFF))}
        known = {vcpu for vcpu in vcpus if vcpu < len(m.vcpu_of_id) and m.vcpu_of_id[vcpu] >= 0}
        for vcpu in sorted(known):
            enter(self._draft, self._config, vcpu)
        self._ran |= known

    def finish(self) -> None:
        """The trace has ended."""
        for vcpu in sorted(self._ran):
            leave(self._draft, self._config, vcpu)


def _identity(config: VmConfig, states: NestedStates, vcpu: int) -> int:
    record = states.vcpus.get(vcpu)
    return first_identity(next(v for v in config.vcpus if v.id == vcpu))[0] if record is None else record.vp_index


def _vps(config: VmConfig, m: Machine, states: NestedStates) -> list[Vp]:
    found = []
    for position, item in enumerate(config.vcpus):
        record = states.vcpus.get(item.id)
        halted = notes.flag(m, position, notes.HALTED)
        if record is None:
            vp = Vp(position, item.id, first_identity(item)[0], running=not halted, nested_ids=(0, 0))
        else:
            lower = modes.lower_of(record)
            vp = Vp(
                position,
                item.id,
                record.vp_index,
                running=not halted and record.mp_state == "runnable",
                in_nested=modes.in_nested_guest(record),
                nested_ids=(lower.vm_id, lower.vp_id),
            )
        found.append(vp)
    return found


def _linear_width(whole: NestedVcpu) -> int:
    return _LA57 if whole.registers["cr4"] & paging.CR4_LA57 else _LA48


def _caller(request: HypercallRequest, whole: NestedVcpu) -> Caller:
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
        raise InvalidValue("a call that is not fast has its block somewhere", field="input_gpa", value=None)
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


def _nested_guest(whole: NestedVcpu, memory: Ram) -> NestedGuest:
    """The nested guest of a vCPU as KVM, which is L0, sees it."""
    lower = modes.lower_of(whole)
    svm = not whole.host.intel
    asks = bool(lower.control & 1) if svm else whole.vmx.evmcs_mapped and asks_for_direct_flush(whole, memory)
    return NestedGuest(
        svm=svm,
        enlightened=svm or whole.vmx.evmcs_mapped,
        asks=asks,
        direct=bool(lower.features & DIRECT_HYPERCALL),
        vm_id=lower.vm_id,
        vp_id=lower.vp_id,
        assist_page=lower.partition_page,
        intercepts=not svm or nested_paging.intercepts_vmmcall(whole),
    )
