"""Hyper-V on one machine: ``vm.hyperv``. Hypercalls and shared pages are rooms of their own; here is the rest."""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import controls as ctl
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME
from engine.errors import InvalidValue, Unsupported
from engine.hyperv import flush_execution, kvm_on_hyperv, notes, queues
from engine.machine.hypercalls import Hypercalls
from engine.machine.hyperv_vps import enter, hyperv_host
from engine.machine.nested_states import open_vcpu
from engine.machine.shared_pages import SharedPages
from engine.state.profiles import kvm_version

CAP_ENFORCE_CPUID = 199

ACTIVITIES = ("running", "halted")


@dataclass(frozen=True)
class FlushQueue:
    """What a vCPU has still to flush, for its guest and for its nested guest, and KVM's statistics."""

    own: tuple[int, ...]
    nested: tuple[int, ...]
    requested: bool
    flushes: int
    hypercalls: int


class HypervOperations(Hypercalls, SharedPages):
    """Hyper-V. ``vcpu`` is a KVM vCPU id; an unknown one raises NotFound."""

    # Queues and what a vCPU does

    def flush_queue(self, vcpu: int) -> FlushQueue:
        """What the vCPU has still to flush."""
        position = self._config.vcpu_position(vcpu)
        now = self._state.current
        m = now.snapshot.machine
        return FlushQueue(
            own=queues.contents(m.queues, position, queues.OWN_QUEUE),
            nested=queues.contents(m.queues, position, queues.NESTED_QUEUE),
            requested=queues.requested(m.queues, position),
            flushes=notes.statistic(m, position, ctl.V_HV_FLUSHES),
            hypercalls=notes.statistic(m, position, ctl.V_HV_HYPERCALLS),
        )

    def service(self, vcpu: int, *, full: bool = False) -> FlushQueue:
        """What the vCPU does before it enters its guest; ``full``: after an unrelated flush of its whole context."""
        position = self._config.vcpu_position(vcpu)
        with self._state.change() as draft:
            if full:
                nested = bool(frames.read_word(draft.machine, FIRST_VCPU_FRAME + position, ctl.V_GUEST_MODE))
                flush_execution.full_flush(draft.machine, position, nested)
            enter(draft, vcpu)
        return self.flush_queue(vcpu)

    def activity(self, vcpu: int) -> str:
        """``running`` in its guest, or ``halted``."""
        halted = self._flag(vcpu, notes.HALTED)
        return ACTIVITIES[halted]

    def set_activity(self, vcpu: int, activity: str) -> None:
        """Halt a vCPU, or let it run: then it first does what was queued for it."""
        position = self._config.vcpu_position(vcpu)
        if activity not in ACTIVITIES:
            raise InvalidValue(f"is one of {', '.join(ACTIVITIES)}", field="activity", value=activity)
        with self._state.change() as draft:
            notes.set_flag(draft.machine, position, notes.HALTED, activity == "halted")
            if activity == "running":
                enter(draft, vcpu)

    def tlb_locked(self, vcpu: int) -> bool:
        """Whether the vCPU's TLB is locked: flushes of it suspend their callers."""
        return self._flag(vcpu, notes.TLB_LOCKED)

    def set_tlb_lock(self, vcpu: int, locked: bool) -> None:
        """Take or release the TLB lock of a vCPU."""
        position = self._config.vcpu_position(vcpu)
        with self._state.change() as draft:
            notes.set_flag(draft.machine, position, notes.TLB_LOCKED, locked)

    # Capabilities

    def direct_flush_available(self) -> bool:
        """KVM_CHECK_EXTENSION(175)."""
        host = hyperv_host(self._config)
        return host is not None and host.direct_flush

    def direct_flush_enabled(self, vcpu: int) -> bool:
        """Whether KVM_CAP_HYPERV_DIRECT_TLBFLUSH is enabled on the vCPU."""
        return self._flag(vcpu, notes.DIRECT_FLUSH)

    def direct_flush_fields(self, vcpu: int) -> dict[str, str]:
        """What enabling it stored in the vCPU's enlightened VMCS or VMCB, and whether the guest's CPUID hides KVM.

        It has to: Hyper-V looks at RCX only, where a hypercall of KVM's own has its second argument.
        """
        fields = self.vmcs_of_kvm(vcpu).fields
        now = self._state.current
        snapshot, states = now.snapshot, now.nested
        hides = not open_vcpu(self._config, states, snapshot.machine, vcpu).shows_kvm
        return {**{name: hex(value) for name, value in fields.items()}, "hides_kvm": hex(hides)}

    def enforcement_available(self) -> bool:
        """KVM_CHECK_EXTENSION(199): Linux 5.14 and later have it."""
        return kvm_version(self._config.profile).hyperv.enforces_cpuid

    def enforces_cpuid(self, vcpu: int) -> bool:
        """Whether KVM_CAP_HYPERV_ENFORCE_CPUID is enabled on the vCPU."""
        return self._flag(vcpu, notes.ENFORCE_CPUID)

    def enable_direct_flush(self, vcpu: int) -> None:
        """KVM_ENABLE_CAP(175). Raises Unsupported with the kernel's errno, and then nothing has changed."""
        position = self._config.vcpu_position(vcpu)
        host = hyperv_host(self._config)
        with self._state.change() as draft:
            errno = "ENOTTY" if host is None else kvm_on_hyperv.enable_direct_flush(draft.machine, position, host)
            if errno is not None:
                raise Unsupported(
                    "must be offered: KVM has it on a Hyper-V that serves flushes of nested guests (host.hyperv)",
                    field="capability",
                    value=kvm_on_hyperv.CAP_DIRECT_FLUSH,
                    errno=errno,
                )

    def enforce_cpuid(self, vcpu: int, enforced: bool) -> None:
        """KVM_ENABLE_CAP(199): whether hypercalls need what CPUID says. Raises Unsupported where there is no such."""
        position = self._config.vcpu_position(vcpu)
        # What an earlier release let a machine of kvm-2019 have, it may give up.
        if not self.enforcement_available() and (enforced or not self._flag(vcpu, notes.ENFORCE_CPUID)):
            raise Unsupported(
                "must be offered: KVM has KVM_CAP_HYPERV_ENFORCE_CPUID from Linux 5.14 on, kvm-2019 is older",
                field="capability",
                value=CAP_ENFORCE_CPUID,
                errno="EINVAL",
            )
        with self._state.change() as draft:
            notes.set_flag(draft.machine, position, notes.ENFORCE_CPUID, enforced)

    # Inside

    def _flag(self, vcpu: int, flag: int) -> bool:
        now = self._state.current
        return notes.flag(now.snapshot.machine, now.config.vcpu_position(vcpu), flag)
