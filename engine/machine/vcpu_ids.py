"""Ids of a machine's vCPUs: which there are, and which one more may be (KVM_CREATE_VCPU)."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import InvalidValue
from engine.state.config import VcpuConfig, VmConfig
from engine.state.profiles import kvm_version


def with_vcpu(config: VmConfig, vcpu: int) -> VmConfig:
    """The configuration with one more vCPU; raises InvalidValue in the kernel's order."""
    limits = kvm_version(config.profile).limits
    if not 0 <= vcpu < limits.vcpu_ids or len(config.vcpus) >= limits.vcpus:
        raise InvalidValue(f"a vCPU id is 0 to {limits.vcpu_ids - 1}", field="vcpu", value=vcpu)
    if any(item.id == vcpu for item in config.vcpus):
        raise InvalidValue("must be a new id: a vCPU has it already", field="vcpu", value=vcpu, errno="EEXIST")
    if len(config.vcpus) >= config.vcpu_records:
        raise InvalidValue(
            f"must not be one too many: the machine has room for {config.vcpu_records} vCPUs", field="vcpu", value=vcpu
        )
    position = len(config.vcpus)
    made = VcpuConfig(vcpu, None if position == vcpu else position, reset=True)
    return replace(config, vcpus=(*config.vcpus, made))
