"""Operations on the nested state of a machine's vCPUs: ``vm.nested``.

A change is made on a copy of one vCPU and published whole, with the guest memory that it wrote; what fails inside the
kernel's own rules is a result, not an exception, and what such a failure leaves behind is published too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine import nested
from engine.abi import UserBuffer
from engine.arch import vmx_msrs
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.kvm_nested_state import NO_ADDRESS
from engine.cpu.frames import FIRST_VCPU_FRAME
from engine.cpu.memory_slots import space_of_record
from engine.errors import InvalidValue, Unsupported
from engine.kvm.memory_views import GuestMemory
from engine.machine.nested_states import (
    NestedStates,
    VmSettings,
    close_vcpu,
    first_identity,
    open_vcpu,
    vcpu_host,
)
from engine.machine.state import Operations
from engine.nested import InstructionResult, RunResult, SetResult
from engine.nested.enlightened import CAP_HYPERV_ENLIGHTENED_VMCS, clean_fields, evmcs_page, evmcs_refusal
from engine.vcpu.cpuid import supported_cpuid
from engine.vcpu.hv_cpuid import evmcs_version, supported_hv_cpuid
from engine.vcpu.msr_numbers import NAMES as HYPERV_MSR_NAMES
from engine.vcpu.msrs import REGISTER_MSR_NAMES, read_msr, write_msr
from engine.vcpu.runtime_cpuid import current_cpuid
from engine.vcpu.vcpu import Vcpu, VcpuHost

MSR_NAMES = {
    vmx_msrs.IA32_FEATURE_CONTROL: "IA32_FEATURE_CONTROL",
    **REGISTER_MSR_NAMES,
    **{number: name for name, number in vmx_msrs.MSR_BY_NAME.items()},
    **HYPERV_MSR_NAMES,
}

# VMX instructions of L1 by name; those with an operand take a guest-physical address.
INSTRUCTIONS: dict[str, Callable[[Vcpu, GuestMemory, int], InstructionResult]] = {
    "vmxon": nested.vmxon,
    "vmclear": nested.vmclear,
    "vmptrld": nested.vmptrld,
    "vmptrst": lambda vcpu, ram, _: nested.vmptrst(vcpu),
    "vmxoff": lambda vcpu, ram, _: nested.vmxoff(vcpu),
    "vmlaunch": lambda vcpu, ram, _: nested.vm_entry(vcpu, ram, launch=True),
    "vmresume": lambda vcpu, ram, _: nested.vm_entry(vcpu, ram, launch=False),
}
WITH_OPERAND = ("vmxon", "vmclear", "vmptrld")


@dataclass(frozen=True, slots=True)
class VcpuMsr:
    """An MSR of a vCPU: ``host`` is what KVM_GET_MSRS reads, ``guest`` what RDMSR reads; None where that faults."""

    index: int
    name: str | None
    host: int | None
    guest: int | None


@dataclass(frozen=True, slots=True)
class MsrWrites:
    """KVM_SET_MSRS, or WRMSRs of the guest: how many were done before the first that faults, and which that is."""

    written: int
    refused: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class EvmcsState:
    """The enlightened VMCS of one vCPU.

    ``attached`` is the GPA of the one in use; ``pending`` says that a restored one waits for the next run; ``wanted``
    is what the assist page asks for. ``fields`` is the one in use by field, where this kernel believes them to be.
    ``lost`` are the controls it takes away, by name: for good from the vCPU's own values in 2019, from what the guest
    reads and may use today.
    """

    enabled: bool
    visible: bool
    versions: int
    attached: int | None
    pending: bool
    wanted: int | None
    clean_fields: int | None
    fields: dict[str, Any] | None
    lost: dict[str, int]


class NestedOperations(Operations):
    """Nested state. ``vcpu`` is a KVM vCPU id; an unknown one raises NotFound."""

    # Reads

    def host(self) -> VcpuHost:
        """The host as nesting sees it."""
        now = self._state.current
        return vcpu_host(now.config, spp_active=now.spp_active)

    @property
    def lapic_in_kernel(self) -> bool:
        """Whether the vCPUs have their local APIC in the kernel."""
        return self._state.current.nested.lapic_in_kernel

    @property
    def settings(self) -> VmSettings:
        """What user space chose for all vCPUs."""
        return self._state.current.nested.settings

    def vcpu(self, vcpu: int) -> Vcpu:
        """The vCPU as it is: a copy, which may be used up. Its methods and ``engine.nested`` answer the rest."""
        return self.read(vcpu)[0]

    def registers_version(self, vcpu: int) -> tuple[object, ...]:
        """Equal to an earlier one as long as no register and no MSR of the vCPU has changed; soon found."""
        now = self._state.current
        snapshot = now.snapshot
        m = snapshot.machine
        words = m.rows[m.row_of[FIRST_VCPU_FRAME + now.config.vcpu_position(vcpu)]].tobytes()
        return now.config, now.nested, now.spp_active, words

    def identities(self) -> list[tuple[int, tuple[CpuidEntry, ...]]]:
        """VP index and CPUID of every vCPU in the order of the configuration, without the cost of the whole vCPUs."""
        touched = self._state.current.nested.vcpus
        found = []
        for item in self._config.vcpus:
            record = touched.get(item.id)
            found.append(first_identity(item) if record is None else (record.vp_index, record.cpuid))
        return found

    def ram(self) -> GuestMemory:
        """Guest memory as published."""
        return GuestMemory(self._published)

    def state(self, vcpu: int) -> bytes:
        """The blob that KVM_GET_NESTED_STATE gives. Raises Unsupported on a host without nested state."""
        blob = nested.read_nested_state(*self.read(vcpu))
        if blob is None:
            raise Unsupported(
                "must be true, on a host that has nested state",
                field="host.nested",
                value=self.host().nested,
                errno="EINVAL",
            )
        return blob

    def explain_state(self, vcpu: int, blob: bytes | None) -> tuple[SetResult, bytes | None]:
        """What ``set_state`` would do, check by check, and the blob that GET would give afterwards."""
        seen, ram = self.read(vcpu)
        result, after = nested.explain_nested_state(seen, ram, UserBuffer.of(blob))
        return result, nested.read_nested_state(after, ram)

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_SUPPORTED_CPUID."""
        host = self.host()
        return supported_cpuid(host.vendor, host.nested, host.maxphyaddr)

    def cpuid(self, vcpu: int) -> tuple[CpuidEntry, ...]:
        """KVM_GET_CPUID2: the leaves that were set, with what follows CR4, XCR0 and the local APIC as it is now."""
        return current_cpuid(self.vcpu(vcpu))

    def hyperv_cpuid(self, vcpu: int) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_HV_CPUID on the vCPU."""
        return supported_hv_cpuid(self.vcpu(vcpu))

    def msrs(self, vcpu: int, indices: Sequence[int] = ()) -> list[VcpuMsr]:
        """The MSRs asked for, or those that have a name or were written."""
        seen = self.vcpu(vcpu)
        wanted = indices or sorted({*MSR_NAMES, *seen.msrs})
        return [
            VcpuMsr(
                index,
                MSR_NAMES.get(index),
                read_msr(seen, index, host=True),
                read_msr(seen, index, host=False),
            )
            for index in wanted
        ]

    def evmcs(self, vcpu: int) -> EvmcsState:
        """The enlightened VMCS of the vCPU."""
        seen, ram = self.read(vcpu)
        attached = seen.vmx.evmptr if seen.vmx.evmcs_mapped else None
        return EvmcsState(
            enabled=seen.evmcs_enabled,
            visible=seen.evmcs_visible,
            versions=evmcs_version(seen),
            attached=attached,
            pending=seen.vmx.evmptr != NO_ADDRESS and attached is None,
            wanted=nested.current_evmcs(seen, ram),
            clean_fields=None if attached is None else clean_fields(seen, ram),
            fields=None if attached is None else seen.kvm.nested.evmcs.decode(evmcs_page(seen, ram) or b""),
            lost=_lost_controls(seen),
        )

    def read(self, vcpu: int) -> tuple[Vcpu, GuestMemory]:
        """The vCPU as it is and guest memory as published: a copy of the one, and memory that is not to be written."""
        now = self._state.current
        machine = now.snapshot.machine
        whole = open_vcpu(now.config, now.nested, machine, vcpu)
        return whole, GuestMemory(now.snapshot, space_of_record(machine, now.config.vcpu_position(vcpu)))

    # Changes

    @contextmanager
    def change(self, vcpu: int) -> Iterator[tuple[Vcpu, GuestMemory]]:
        """One vCPU and guest memory, to be changed in place; published when the block ends well."""
        position = self._config.vcpu_position(vcpu)
        with self._state.change() as change:
            whole = open_vcpu(change.config, change.nested, change.machine, vcpu)
            yield whole, GuestMemory(change, space_of_record(change.machine, position))
            change.nested = close_vcpu(change, change.nested, whole)

    def set_state(self, vcpu: int, blob: bytes | None, *, explain: bool = False) -> SetResult:
        """KVM_SET_NESTED_STATE. A blob that fails after V9 leaves a new state behind, as in the kernel."""
        with self.change(vcpu) as (whole, ram):
            return nested.set_nested_state(whole, ram, UserBuffer.of(blob), explain=explain)

    def set_cpuid(self, vcpu: int, entries: Sequence[CpuidEntry]) -> None:
        """KVM_SET_CPUID2. Raises InvalidValue, and then nothing has changed, where the kernel says EINVAL."""
        with self.change(vcpu) as (whole, _):
            errno = nested.set_cpuid(whole, tuple(entries))
            if errno is not None:
                rule = "linear addresses have 48 or 57 bits, and today's kernel takes new leaves before L2 and the run"
                raise InvalidValue(rule, field="entries", value=len(entries), errno=errno)

    def write_msrs(self, vcpu: int, writes: Sequence[tuple[int, int]], *, guest: bool = False) -> MsrWrites:
        """KVM_SET_MSRS, or WRMSR by the guest: in order, up to the first (index, value) that faults."""
        with self.change(vcpu) as (whole, ram):
            for position, (index, value) in enumerate(writes):
                if guest:
                    done = write_msr(whole, ram, index, value, host=False)
                else:
                    done = nested.set_msr(whole, ram, index, value)
                if not done:
                    return MsrWrites(position, (index, value))
        return MsrWrites(len(writes), None)

    def enable_evmcs(self, vcpu: int) -> int:
        """KVM_ENABLE_CAP(163): the version range. Raises Unsupported, with the kernel's errno, where there is none."""
        with self.change(vcpu) as (whole, _):
            errno = evmcs_refusal(whole)
            if errno is not None:
                raise Unsupported(
                    "must be offered: this host has no enlightened VMCS for guests (host.nested, host.nested_evmcs)",
                    field="capability",
                    value=CAP_HYPERV_ENLIGHTENED_VMCS,
                    errno=errno,
                )
            return nested.enable_evmcs(whole)

    def execute(self, vcpu: int, instruction: str, operand: int = 0) -> InstructionResult:
        """A VMX instruction of L1, one of INSTRUCTIONS. Raises Conflict while the vCPU runs L2."""
        run = INSTRUCTIONS.get(instruction)
        if run is None:
            raise InvalidValue(
                f"an instruction is one of {', '.join(INSTRUCTIONS)}", field="instruction", value=instruction
            )
        if not self._config.host.vendor == "intel":
            raise Unsupported("VMX needs an Intel host", field="host.vendor", value=self._config.host.vendor)
        with self.change(vcpu) as (whole, ram):
            return run(whole, ram, operand)

    def set_smm(self, vcpu: int, smm: bool) -> None:
        """smi.smm of KVM_SET_VCPU_EVENTS."""
        with self.change(vcpu) as (whole, ram):
            nested.set_smm(whole, ram, smm)

    def prepare_run(self, vcpu: int) -> RunResult:
        """What KVM_RUN does before the guest moves: a restored enlightened VMCS is attached."""
        with self.change(vcpu) as (whole, ram):
            return nested.prepare_run(whole, ram)

    def choose(self, **settings: Any) -> None:
        """Choose some of the settings of all vCPUs; the others stay."""
        with self._state.change() as change:
            change.nested = replace(change.nested, settings=replace(change.nested.settings, **settings), heads={})

    def set_lapic_in_kernel(self, present: bool) -> None:
        """Whether the vCPUs have their local APIC in the kernel (KVM_CREATE_IRQCHIP before them)."""
        with self._state.change() as change:
            change.nested = replace(change.nested, lapic_in_kernel=present, heads={})


def nested_in_use(states: NestedStates) -> bool:
    """Whether a vCPU is in VMX operation, in L2, or has its enlightened VMCS enabled."""
    return any(
        item.vmx.in_operation or item.vmx.guest_mode or item.svm.guest_mode or item.evmcs_enabled
        for item in states.vcpus.values()
    )


def _lost_controls(vcpu: Vcpu) -> dict[str, int]:
    """May-be-1 bits, by control, that the enlightened VMCS takes from what the vCPU would have without it."""
    if not vcpu.evmcs_visible:
        return {}
    whole = vcpu.host.capabilities(vcpu.profile)
    if vcpu.kvm.nested.evmcs_clears_controls:
        lost = {name: whole.controls[name].may1 & mask for name, mask in vmx_msrs.EVMCS_CLEARED.items()}
        lost["vmfunc"] = whole.values["vmfunc"] & vmx_msrs.EVMCS_CLEARED_VMFUNC
    else:
        lost = {name: whole.controls[name].may1 & ~mask for name, mask in vmx_msrs.EVMCS_SUPPORTED.items()}
        lost["vmfunc"] = whole.values["vmfunc"] & ~vmx_msrs.EVMCS_SUPPORTED_VMFUNC
    return {name: mask for name, mask in lost.items() if mask}
