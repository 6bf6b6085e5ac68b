"""What a machine is: fixed at creation, validated whole before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from engine.arch import controls as ctl
from engine.arch import ept
from engine.arch.hyperv_cpuid import CpuidEntry
from engine.arch.vmx_msrs import MSR_BY_NAME
from engine.errors import InvalidValue, NotFound
from engine.state.default_host import VMX_CAPABILITIES
from engine.state.profiles import KVM_2019, PROFILES

TRANSLATION_CACHES = ("off", "model")
VENDORS = ("intel", "amd")
FLUSH_POLICIES = ("kvm", "tlfs")
FLUSH_EXECUTIONS = ("exact", "kvm", "paranoid")
MAX_VCPUS = 1024
MAX_VCPU_ID = 4095

# An error names so many ids.
_NAMED = 8

MIN_MAXPHYADDR = 36
MAX_MAXPHYADDR = 52

# And what KVM reports to a guest hypervisor, by the name of the MSR; those that follow from others cannot be given.
_DERIVED = ("PINBASED_CTLS", "PROCBASED_CTLS", "EXIT_CTLS", "ENTRY_CTLS", "CR4_FIXED1")
NESTED_CAPABILITIES = tuple(name for name in MSR_BY_NAME if name not in {f"IA32_VMX_{part}" for part in _DERIVED})


@dataclass(frozen=True)
class VcpuConfig:
    """One vCPU: its KVM id, its Hyper-V VP index (the id unless given) and its CPUID leaves.

    ``reset``: it began as KVM_CREATE_VCPU makes one, with the registers after RESET.
    """

    id: int
    vp_index: int | None = None
    cpuid: tuple[Any, ...] = ()
    reset: bool = False

    @cached_property
    def leaves(self) -> tuple[CpuidEntry, ...]:
        """``cpuid``, whose leaves may be mappings."""
        return tuple(leaf if isinstance(leaf, CpuidEntry) else CpuidEntry(**leaf) for leaf in self.cpuid)


@dataclass(frozen=True)
class HostConfig:
    """The host under KVM. ``nested`` None means the default of the profile (design: off for kvm-latest with SPP).

    ``evmcs`` says that KVM itself, under Hyper-V, uses the enlightened VMCS; ``nested_evmcs`` that it offers one to its
    guests. ``smt`` says that the host's threads may share cores.
    """

    vendor: str = "intel"
    ept: bool = True
    spp: bool = True
    nested: bool | None = None
    evmcs: bool | None = None
    vmx_capabilities: Mapping[str, int] = field(default_factory=dict)
    hyperv: Mapping[str, Any] | None = None
    fail_allocation: int | None = None
    nested_evmcs: bool = True
    smt: bool = True

    @property
    def supports_spp(self) -> bool:
        return self.vendor == "intel" and self.ept and self.spp

    def capability(self, name: str) -> int:
        """A capability MSR: as given, else of the default host."""
        return self.vmx_capabilities.get(name, VMX_CAPABILITIES[name])

    @property
    def executes_only(self) -> bool:
        """Whether pages can be executed and not read: EPT may, nested paging and shadow page tables cannot."""
        return self.vendor == "intel" and self.ept and bool(self.capability("ept_vpid_cap") & ept.CAP_EXECUTE_ONLY)

    @property
    def secondary_allowed(self) -> int:
        """Secondary processor-based controls that may be 1; a host without EPT or SPP lacks them whatever it says."""
        lacking = 0 if self.ept else ctl.SECONDARY_EPT
        if not self.supports_spp:
            lacking |= ctl.SECONDARY_SPP
        return self.capability("procbased_ctls2") >> 32 & ~lacking


@dataclass(frozen=True)
class VmConfig:
    """Everything about a machine that does not change after creation.

    ``vcpus`` alone may grow, up to ``vcpu_room``: a machine with such room may begin without any (KVM_CREATE_VCPU).
    """

    name: str = ""
    profile: str = KVM_2019
    vcpus: tuple[VcpuConfig, ...] = (VcpuConfig(0),)
    vcpu_room: int = 0
    maxphyaddr: int = 46
    translation_cache: str = "off"
    host: HostConfig = field(default_factory=HostConfig)
    require_match: bool = False
    max_table_frames: int = 1 << 20
    flush_policy: str = "kvm"
    flush_execution: str | None = None

    @property
    def executes_flushes(self) -> str:
        """How flushes are carried out: as given, else exactly under the specification and as KVM does under KVM."""
        return self.flush_execution or ("exact" if self.flush_policy == "tlfs" else "kvm")

    @property
    def vcpu_records(self) -> int:
        """How many vCPUs the machine keeps a place for, those that are still to come included; at least one."""
        return max(len(self.vcpus), self.vcpu_room)

    def vcpu_position(self, vcpu: int) -> int:
        """Position of the vCPU with a KVM id. Raises NotFound."""
        for position, item in enumerate(self.vcpus):
            if item.id == vcpu:
                return position
        raise NotFound(self.vcpu_rule, field="vcpu", value=vcpu)

    @property
    def vcpu_rule(self) -> str:
        """Which ids vCPUs of this machine have, for errors."""
        ids = ", ".join(str(item.id) for item in self.vcpus[:_NAMED])
        more = ", …" if len(self.vcpus) > _NAMED else ""
        return f"must be the id of a vCPU of this machine, which has {ids or 'none yet'}{more}"

    @property
    def ept_levels(self) -> int:
        """Depth of KVM's EPT: five levels where the guest is wider than 48 bits and the host has them."""
        wide = self.maxphyaddr > 48 and self.host.capability("ept_vpid_cap") & ept.CAP_WALK_5
        return 5 if wide else 4

    def validate(self) -> None:
        """Refuse a machine that cannot be."""
        choices(self.profile, PROFILES, "profile")
        choices(self.translation_cache, TRANSLATION_CACHES, "translation_cache")
        choices(self.host.vendor, VENDORS, "host.vendor")
        choices(self.flush_policy, FLUSH_POLICIES, "flush_policy")
        choices(self.executes_flushes, FLUSH_EXECUTIONS, "flush_execution")
        if not MIN_MAXPHYADDR <= self.maxphyaddr <= MAX_MAXPHYADDR:
            raise InvalidValue(
                f"maxphyaddr is {MIN_MAXPHYADDR} to {MAX_MAXPHYADDR}", field="maxphyaddr", value=self.maxphyaddr
            )
        for name, value in self.host.vmx_capabilities.items():
            choices(name, (*VMX_CAPABILITIES, *NESTED_CAPABILITIES), "host.vmx_capabilities")
            if not 0 <= value < 1 << 64:
                raise InvalidValue("a capability has 64 bits", field=f"host.vmx_capabilities.{name}", value=value)
        if self.host.fail_allocation is not None and not 1 <= self.host.fail_allocation < 1 << 32:
            raise InvalidValue(
                "an allocation is counted from 1, the next",
                field="host.fail_allocation",
                value=self.host.fail_allocation,
            )
        self._validate_vcpus()

    def _validate_vcpus(self) -> None:
        room, count = self.vcpu_room, len(self.vcpus)
        if not 0 <= room <= MAX_VCPUS:
            raise InvalidValue(f"a machine has room for 1 to {MAX_VCPUS} vCPUs", field="max_vcpus", value=room)
        if not (0 if room else 1) <= count <= (room or MAX_VCPUS):
            raise InvalidValue(f"a machine has 1 to {room or MAX_VCPUS} vCPUs", field="vcpus", value=count)
        for position, vcpu in enumerate(self.vcpus):
            if not 0 <= vcpu.id <= MAX_VCPU_ID:
                raise InvalidValue(f"a vCPU id is 0 to {MAX_VCPU_ID}", field=f"vcpus[{position}].id", value=vcpu.id)
        ids = [vcpu.id for vcpu in self.vcpus]
        if len(set(ids)) != len(ids):
            raise InvalidValue("must be distinct", field="vcpus", value=ids)


def choices(value: str, allowed: tuple[str, ...], name: str) -> None:
    """Refuse a word that is not one of those allowed."""
    if value not in allowed:
        raise InvalidValue(f"{name} is one of {', '.join(allowed)}", field=name, value=value)
