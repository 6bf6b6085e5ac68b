"""Pages that hypervisors share, and who is whose guest: VP assist pages, enlightened VMCSs, partitions."""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import controls as ctl
from engine.arch.hyperv_pages import PARTITION_ASSIST, VP_ASSIST_SIZE
from engine.errors import InvalidValue, NotFound
from engine.hyperv import kvm_on_hyperv, modes
from engine.hyperv.flush_execution import Vp
from engine.kvm.memory_views import GuestMemory
from engine.machine.hyperv_vps import hyperv_host, nested_guest_of, vps_of
from engine.machine.nested_states import NestedStates, open_vcpu
from engine.machine.state import Operations
from engine.state.frame_store import Snapshot
from engine.vcpu.msr_numbers import HV_VP_ASSIST_PAGE

_ASSIST_ENABLED = 1


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


# What an enlightened VMCS and a VMCB have for Hyper-V, by the names of the former.
ENLIGHTENED_FIELDS = ("hv_enlightenments_control", "hv_vp_id", "hv_vm_id", "partition_assist_page", "hv_clean_fields")


@dataclass(frozen=True)
class KvmVmcs:
    """The ``evmcs`` or ``vmcb`` by which KVM, a guest of Hyper-V, runs a vCPU; ``address`` is host-physical."""

    kind: str
    address: int
    page: bytes
    fields: dict[str, int]


class SharedPages(Operations):
    """Assist pages and partitions. ``vcpu`` is a KVM vCPU id; an unknown one raises NotFound."""

    def vp_assist_page(self, vcpu: int, *, of_kvm: bool = False) -> bytes:
        """The VP assist page of the guest, or that of KVM where it runs on Hyper-V. Raises NotFound without one."""
        position = self._config.vcpu_position(vcpu)
        snapshot = self._published
        if of_kvm:
            self._host()
            return kvm_on_hyperv.assist_page(snapshot.machine, position)
        page = GuestMemory(snapshot).read(self._assist_gpa(vcpu), VP_ASSIST_SIZE)
        if page is None:
            raise NotFound("must be one whose VP assist page is in guest memory", field="vcpu", value=vcpu)
        return page

    def set_vp_assist_page(self, vcpu: int, data: bytes) -> None:
        """Store the first bytes of the guest's VP assist page, as its kernel would."""
        if len(data) > VP_ASSIST_SIZE:
            raise InvalidValue(f"the page has {VP_ASSIST_SIZE} bytes in use", field="body", value=len(data))
        gpa = self._assist_gpa(vcpu)
        with self._state.change() as draft:
            if data and not GuestMemory(draft).write(gpa, data):
                raise NotFound("must be one whose VP assist page is in guest memory", field="vcpu", value=vcpu)

    def vmcs_of_kvm(self, vcpu: int) -> KvmVmcs:
        """What KVM, on Hyper-V, runs the vCPU by. Raises NotFound where it does not."""
        position = self._config.vcpu_position(vcpu)
        host, m = self._host(), self._published.machine
        page = kvm_on_hyperv.control_page(m, position, host)
        fields = {name: host.control.get(page, name) for name in ENLIGHTENED_FIELDS}
        return KvmVmcs(
            "vmcb" if host.svm else "evmcs", kvm_on_hyperv.address(m, position, ctl.V_HV_EVMCS), page, fields
        )

    def load_on_cpu(self, cpu: int, vcpu: int) -> None:
        """KVM, on Hyper-V, loads a vCPU on the CPU of another, or on its own; ``cpu`` is the id of whose CPU it is."""
        place, position = self._config.vcpu_position(cpu), self._config.vcpu_position(vcpu)
        host = self._host()
        with self._state.change() as draft:
            kvm_on_hyperv.load(draft.machine, place, host, position)

    def leave_cpu(self, cpu: int) -> None:
        """KVM leaves the CPU of a vCPU: the module goes, or virtualization is switched off."""
        place = self._config.vcpu_position(cpu)
        self._host()
        with self._state.change() as draft:
            kvm_on_hyperv.unload(draft.machine, place)

    def _host(self) -> kvm_on_hyperv.HypervHost:
        host = hyperv_host(self._config)
        if host is None:
            raise NotFound(
                "must be guest: KVM has an assist page only on Hyper-V (host.hyperv)", field="of", value="kvm"
            )
        return host

    def partitions(self) -> list[PartitionVp]:
        """Nested VPs by the vCPU that ran them last; vCPUs that ran none have ids of 0."""
        now = self._state.current
        snapshot, states = now.snapshot, now.nested
        host = hyperv_host(self._config)
        return [self._partition_vp(snapshot, states, vp, host) for vp in vps_of(self._config, snapshot.machine, states)]

    def _partition_vp(
        self, snapshot: Snapshot, states: NestedStates, vp: Vp, host: kvm_on_hyperv.HypervHost | None
    ) -> PartitionVp:
        memory: GuestMemory | kvm_on_hyperv.HostPages = GuestMemory(snapshot)
        if host is None:
            whole = open_vcpu(self._config, states, snapshot.machine, vp.vcpu)
            guest, running = nested_guest_of(whole, GuestMemory(snapshot)), modes.in_nested_guest(whole)
        else:
            memory = kvm_on_hyperv.HostPages(snapshot.machine)
            guest, running = kvm_on_hyperv.nested_guest(snapshot.machine, vp.position, host), vp.running
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
        self._config.vcpu_position(vcpu)
        now = self._state.current
        snapshot, states = now.snapshot, now.nested
        where = open_vcpu(self._config, states, snapshot.machine, vcpu).msrs.get(HV_VP_ASSIST_PAGE, 0)
        if not where & _ASSIST_ENABLED:
            raise NotFound(
                "must be one whose guest has enabled its VP assist page: write MSR 0x40000073", field="vcpu", value=vcpu
            )
        return where & ~0xFFF
