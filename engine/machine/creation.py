"""A machine's first state: registers, records of its vCPUs, an empty EPT."""

from __future__ import annotations

import numpy as np

from engine.arch.words import signed
from engine.cpu import frames, host_physical_memory
from engine.hyperv import kvm_on_hyperv
from engine.kvm import choice_bits
from engine.kvm import state_frame as reg
from engine.machine import vcpu_records
from engine.state.config import VmConfig
from engine.state.frame_store import Draft, FrameStore
from engine.state.profiles import kvm_version


def new_store(config: VmConfig, records: int | None = None) -> FrameStore:
    """An empty store for a machine: its capabilities and vCPU ids, and how many records of vCPUs it has, those of
    ``config`` unless said otherwise."""
    width = config.maxphyaddr
    caps = np.zeros(frames.CAPS, dtype=np.int64)
    caps[frames.CAP_ARENA] = host_physical_memory.table_memory(width)
    caps[frames.CAP_RESERVED_ADDRESS] = ((1 << 52) - 1) & ~((1 << width) - 1)
    caps[frames.CAP_EPT_VPID] = signed(config.host.capability("ept_vpid_cap"))
    caps[frames.CAP_SECONDARY_ALLOWED] = config.host.secondary_allowed
    caps[frames.CAP_TERTIARY_ALLOWED] = signed(config.host.capability("procbased_ctls3"))
    rows = kvm_version(config.profile).subpages
    caps[frames.CAP_KVM] = choice_bits.caps(rows)
    caps[frames.CAP_SAVED_SHIFT] = rows.saved_shift
    caps[frames.CAP_FAST_PATH] = config.translation_cache == "off"
    records = vcpu_records.wanted(config) if records is None else records
    vcpu_records.count(caps, config, records)
    modelled = config.translation_cache == "model"
    ids = vcpu_records.positions(config)
    return FrameStore(caps, ids, config.max_table_frames, vcpus=records, modelled=modelled)


def build(draft: Draft, config: VmConfig) -> None:
    """Frame 0, one frame for each vCPU that is, and places for those that may come; the EPT root."""
    records = vcpu_records.wanted(config)
    draft.ensure(records)
    m = draft.machine
    frames.new_frame(m, frames.STATE)
    for _ in range(records):
        frames.new_frame(m, frames.VCPU)
    draft.keep_places(config.vcpu_records - records)
    m = draft.machine
    frames.write_word(m, frames.STATE_FRAME, reg.ROOT_EPT, frames.new_frame(m, frames.EPT))
    frames.write_word(m, frames.STATE_FRAME, reg.EPT_LEVELS, config.ept_levels)
    frames.write_word(m, frames.STATE_FRAME, reg.FAIL_ALLOCATION, config.host.fail_allocation or 0)
    for position in range(records):
        vcpu_records.fill(m, config, position)
    below = kvm_on_hyperv.HypervHost.under(config)
    if below is not None:
        draft.ensure(2 * records + frames.RESERVE)
        kvm_on_hyperv.build(draft.machine, range(records), below)
