"""The VPs of a machine as Hyper-V's rules see them, and what each does before and after it runs its guest."""

from __future__ import annotations

from engine.arch import controls as ctl
from engine.arch.hyperv_pages import DIRECT_HYPERCALL
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine
from engine.hyperv import flush_execution, kvm_on_hyperv, modes, nested_paging, notes, queues
from engine.hyperv.flush_execution import Facts, Vp
from engine.hyperv.l2_hypercalls import NestedGuest
from engine.kvm.memory_views import GuestMemory
from engine.machine.linear_width import host_width
from engine.machine.nested_states import NestedStates, first_identity, first_mp_state
from engine.machine.state import Change
from engine.nested.enlightened import asks_for_direct_flush
from engine.state.config import VmConfig
from engine.trace.columns import TraceChunk
from engine.vcpu.vcpu import Vcpu


def hyperv_host(config: VmConfig) -> kvm_on_hyperv.HypervHost | None:
    """The Hyper-V under KVM, None where there is none."""
    return kvm_on_hyperv.HypervHost.under(config)


def vps_of(config: VmConfig, m: Machine, states: NestedStates) -> list[Vp]:
    found = []
    for position, item in enumerate(config.vcpus):
        record = states.vcpus.get(item.id)
        halted = notes.flag(m, position, notes.HALTED)
        if record is None:
            runs = first_mp_state(item, states) == "runnable"
            vp = Vp(position, item.id, first_identity(item)[0], running=runs and not halted, nested_ids=(0, 0))
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


def nested_guest_of(whole: Vcpu, memory: GuestMemory) -> NestedGuest:
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


def enter(change: Change, vcpu: int) -> None:
    """A vCPU is about to run its guest: it does what was queued for it, and on Hyper-V it is loaded on its CPU.

    One that the machine has not does nothing.
    """
    m = change.machine
    position = int(m.vcpu_of_id[vcpu]) if vcpu < len(m.vcpu_of_id) else -1
    host = hyperv_host(change.config)
    if host is not None and position >= 0:
        change.ensure()
        m = change.machine
        kvm_on_hyperv.entering(m, position, _identity(change, vcpu), host)
    if position >= 0 and queues.requested(m.queues, position):
        change.ensure()
        m = change.machine
        frame = FIRST_VCPU_FRAME + position
        nested = bool(frames.read_word(m, frame, ctl.V_GUEST_MODE))
        width = host_width(change.config, m, change.nested)
        flush_execution.service(m, position, nested, Facts.of(change.config, width))


def leave(change: Change, vcpu: int) -> None:
    """A vCPU has run its guest: on Hyper-V, KVM notes what it notes after an exit."""
    host = hyperv_host(change.config)
    if host is not None:
        change.ensure()
        position = int(change.machine.vcpu_of_id[vcpu])
        kvm_on_hyperv.exited(change.machine, position, _identity(change, vcpu), host)


class Runs:
    """The vCPUs that a trace runs: each does what was queued for it before its first access of a chunk."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._on_hyperv = change.config.host.hyperv is not None
        self._ran: set[int] = set()
        self._quiet = False

    def __call__(self, chunk: TraceChunk) -> None:
        """A chunk is about to be replayed."""
        m = self._change.machine
        # Looked for once, and after operations: nothing else of a trace queues a flush.
        self._quiet = not self._on_hyperv and (self._quiet or not queues.any_requested(m.queues))
        if self._quiet:
            self._quiet = chunk.operations is None
            return
        known = {vcpu for vcpu in chunk.vcpus() if vcpu < len(m.vcpu_of_id) and m.vcpu_of_id[vcpu] >= 0}
        for vcpu in sorted(known):
            enter(self._change, vcpu)
        self._ran |= known

    def finish(self) -> None:
        """The trace has ended."""
        for vcpu in sorted(self._ran):
            leave(self._change, vcpu)


def _identity(change: Change, vcpu: int) -> int:
    record = change.nested.vcpus.get(vcpu)
    config = change.config
    return first_identity(config.vcpus[config.vcpu_position(vcpu)])[0] if record is None else record.vp_index
