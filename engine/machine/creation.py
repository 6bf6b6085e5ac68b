"""A machine's first state: registers, vCPU records, an empty EPT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept
from engine.arch.words import signed
from engine.cpu import frames
from engine.errors import InvalidValue
from engine.hyperv import l0_hyperv
from engine.kvm import choices, mapping
from engine.kvm import registers as reg
from engine.state.config import VcpuConfig, VmConfig
from engine.state.frame_store import Draft, FrameStore
from engine.state.kvm_versions import kvm_version

# A 64-bit guest with paging on, as the selftests leave one.
CR0 = 0x8005_0033
CR4 = 0x0000_06F0
EFER = 0xD01


def new_store(config: VmConfig) -> FrameStore:
    """An empty store for a machine: its capabilities and vCPU ids."""
    width = config.maxphyaddr
    caps = np.zeros(frames.CAPS, dtype=np.int64)
    caps[frames.CAP_ARENA] = 1 << (width - 1)
    caps[frames.CAP_RESERVED_ADDRESS] = ((1 << 52) - 1) & ~((1 << width) - 1)
    caps[frames.CAP_EPT_VPID] = signed(config.host.capability("ept_vpid_cap"))
    caps[frames.CAP_SECONDARY_ALLOWED] = config.host.secondary_allowed
    caps[frames.CAP_TERTIARY_ALLOWED] = signed(config.host.capability("procbased_ctls3"))
    rows = kvm_version(config.profile).subpages
    trees = config.vcpu_records if rows.sppt_per_vcpu else 1
    caps[frames.CAP_KVM] = choices.caps(rows)
    caps[frames.CAP_SAVED_SHIFT] = rows.saved_shift
    caps[frames.CAP_SPPT_TREES] = trees
    caps[frames.CAP_RESERVE] = frames.RESERVE + frames.RESERVE_PER_SPPT * (trees - 1)
    caps[frames.CAP_FAST_PATH] = config.translation_cache == "off"
    ids = vcpu_positions(config)
    caps[frames.CAP_VCPUS] = len(ids)
    modelled = config.translation_cache == "model"
    return FrameStore(caps, ids, config.max_table_frames, vcpus=config.vcpu_records, modelled=modelled)


def vcpu_positions(config: VmConfig) -> NDArray[np.int64]:
    """Position of a vCPU by its id, -1 where there is none; longer than any id."""
    ids = np.full(max((v.id for v in config.vcpus), default=0) + 1, -1, dtype=np.int64)
    for position, vcpu in enumerate(config.vcpus):
        ids[vcpu.id] = position
    return ids


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
    return replace(config, vcpus=(*config.vcpus, VcpuConfig(vcpu)))


def admit_vcpus(draft: Draft, config: VmConfig) -> None:
    """Make the vCPUs of a grown configuration known; their records have been there since birth."""
    ids = vcpu_positions(config)
    caps = draft.machine.caps.copy()
    caps[frames.CAP_VCPUS] = len(ids)
    draft.machine = draft.machine._replace(caps=caps, vcpu_of_id=ids)


def build(draft: Draft, config: VmConfig) -> None:
    """Frame 0, one frame for each vCPU that is or may come, and the EPT root."""
    draft.ensure(config.vcpu_records)
    m = draft.machine
    frames.new_frame(m, frames.STATE)
    for _ in range(config.vcpu_records):
        frames.new_frame(m, frames.VCPU)
    frames.write_word(m, frames.STATE_FRAME, reg.ROOT_EPT, frames.new_frame(m, frames.EPT))
    frames.write_word(m, frames.STATE_FRAME, reg.EPT_LEVELS, config.ept_levels)
    frames.write_word(m, frames.STATE_FRAME, reg.FAIL_ALLOCATION, config.host.fail_allocation or 0)
    eptp = int(mapping.ept_pointer(m))
    if config.host.capability("ept_vpid_cap") & ept.CAP_ACCESSED_DIRTY:
        eptp |= ept.EPTP_ACCESSED_DIRTY
    secondary = ctl.SECONDARY_VPID
    if config.host.ept:
        secondary |= ctl.SECONDARY_EPT | ctl.SECONDARY_UNRESTRICTED
    if config.host.supports_spp and kvm_version(config.profile).subpages.control_from_birth:
        secondary |= ctl.SECONDARY_SPP
    for position in range(config.vcpu_records):
        first = {
            ctl.V_EPTP: eptp,
            ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY,
            ctl.V_SECONDARY: secondary,
            ctl.V_PML_INDEX: 511,
            ctl.V_VPID: position + 1,
            ctl.V_CR0: CR0,
            ctl.V_CR4: CR4,
            ctl.V_EFER: EFER,
        }
        for word, value in first.items():
            frames.write_word(m, frames.FIRST_VCPU_FRAME + position, word, value)
    below = l0_hyperv.HypervHost.under(config)
    if below is not None:
        draft.ensure(2 * config.vcpu_records + frames.RESERVE)
        l0_hyperv.build(draft.machine, config.vcpu_records, below)
