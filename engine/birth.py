"""A machine's first state: registers, vCPU records, an empty EPT."""

from __future__ import annotations

import numpy as np

from engine.arch import controls as ctl
from engine.arch import ept
from engine.arch.words import signed
from engine.config import VmConfig
from engine.cpu import frames
from engine.hyperv import on_hyperv
from engine.kvm import mapping
from engine.kvm import registers as reg
from engine.store import Draft, FrameStore

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
    caps[frames.CAP_FILL_IN_SET] = config.profile == "kvm-2019"
    caps[frames.CAP_REGION_FILL] = config.profile == "kvm-latest"
    caps[frames.CAP_FAST_PATH] = config.translation_cache == "off"
    ids = np.full(max(v.id for v in config.vcpus) + 1, -1, dtype=np.int64)
    for position, vcpu in enumerate(config.vcpus):
        ids[vcpu.id] = position
    caps[frames.CAP_VCPUS] = len(ids)
    return FrameStore(caps, ids, config.max_table_frames, modelled=config.translation_cache == "model")


def build(draft: Draft, config: VmConfig) -> None:
    """Frame 0, one frame a vCPU, and the EPT root."""
    draft.ensure(len(config.vcpus) + frames.RESERVE)
    m = draft.machine
    frames.new_frame(m, frames.STATE)
    for _ in config.vcpus:
        frames.new_frame(m, frames.VCPU)
    frames.write_word(m, frames.STATE_FRAME, reg.ROOT_EPT, frames.new_frame(m, frames.EPT))
    frames.write_word(m, frames.STATE_FRAME, reg.EPT_LEVELS, config.ept_levels)
    eptp = int(mapping.ept_pointer(m))
    if config.host.capability("ept_vpid_cap") & ept.CAP_ACCESSED_DIRTY:
        eptp |= ept.EPTP_ACCESSED_DIRTY
    secondary = ctl.SECONDARY_EPT | ctl.SECONDARY_VPID | ctl.SECONDARY_UNRESTRICTED
    if config.host.supports_spp and config.profile == "kvm-2019":
        secondary |= ctl.SECONDARY_SPP
    for position in range(len(config.vcpus)):
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
    if config.host.hyperv is not None:
        draft.ensure(2 * len(config.vcpus) + frames.RESERVE)
        on_hyperv.build(draft.machine, len(config.vcpus))


def load_sppt(draft: Draft, config: VmConfig) -> None:
    """Load SPPTP into every vCPU; later series switch the control on only now."""
    m = draft.machine
    root = int(frames.address_of(m, frames.read_word(m, frames.STATE_FRAME, reg.ROOT_SPPT)))
    for position in range(len(config.vcpus)):
        frame = frames.FIRST_VCPU_FRAME + position
        frames.write_word(m, frame, ctl.V_SPPTP, root)
        secondary = int(frames.read_word(m, frame, ctl.V_SECONDARY)) | ctl.SECONDARY_SPP
        frames.write_word(m, frame, ctl.V_SECONDARY, secondary)


def nested(config: VmConfig, *, default: bool) -> bool:
    """Whether the host allows nesting; unset, it is as the profile has it with sub-page protection."""
    return default if config.host.nested is None else config.host.nested
