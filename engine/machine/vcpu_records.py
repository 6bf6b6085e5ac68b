"""Records of a machine's vCPUs, one frame each: made with the machine, or when KVM_CREATE_VCPU asks for one.

A machine may have room for a thousand vCPUs. Until one is made, its frame is a number that is kept and nothing else;
only the first record is always there, as the home of what KVM has once for all vCPUs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import ept
from engine.arch.words import signed
from engine.cpu import frames
from engine.cpu.frames import FIRST_VCPU_FRAME
from engine.cpu.host_physical_memory import frame_at
from engine.hyperv import kvm_on_hyperv
from engine.kvm import spp_control, sppt_roots, sppt_tables
from engine.kvm import state_frame as reg
from engine.machine import address_spaces, page_logs
from engine.machine.nested_states import SHARED_REGISTERS
from engine.machine.state import register
from engine.state.config import VmConfig
from engine.state.frame_store import Draft
from engine.state.profiles import kvm_version
from engine.vcpu.registers import RESET_REGISTERS

# A 64-bit guest with paging on, as the selftests leave one.
CR0 = 0x8005_0033
CR4 = 0x0000_06F0
EFER = 0xD01


def wanted(config: VmConfig) -> int:
    """How many records a new machine has; one that an earlier release stored may have more."""
    return max(1, len(config.vcpus))


def count(caps: NDArray[np.int64], config: VmConfig, records: int) -> None:
    """Note in ``caps`` what follows from the number of records."""
    trees = records if kvm_version(config.profile).subpages.sppt_per_vcpu else 1
    caps[frames.CAP_SPPT_TREES] = trees
    caps[frames.CAP_RESERVE] = frames.RESERVE + frames.RESERVE_PER_SPPT * (trees - 1)
    caps[frames.CAP_VCPUS] = len(positions(config))
    caps[frames.CAP_PLACES] = config.vcpu_records - records


def positions(config: VmConfig) -> NDArray[np.int64]:
    """Position of a vCPU by its id, -1 where there is none; longer than any id."""
    ids = np.full(max((v.id for v in config.vcpus), default=0) + 1, -1, dtype=np.int64)
    for position, vcpu in enumerate(config.vcpus):
        ids[vcpu.id] = position
    return ids


def fill(m: frames.Machine, config: VmConfig, position: int) -> None:
    """What a new record says: a vCPU that runs the guest which the selftests leave."""
    secondary = ctl.SECONDARY_VPID
    if config.host.ept:
        secondary |= ctl.SECONDARY_EPT | ctl.SECONDARY_UNRESTRICTED
    secondary |= spp_control.at_creation(config)
    first = {
        ctl.V_EPTP: address_spaces.pointer_to(m, 0),
        ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY,
        ctl.V_SECONDARY: secondary,
        ctl.V_PML_INDEX: 511,
        ctl.V_VPID: position + 1,
        ctl.V_CR0: CR0,
        ctl.V_CR4: CR4,
        ctl.V_EFER: EFER,
    }
    for word, value in first.items():
        frames.write_word(m, FIRST_VCPU_FRAME + position, word, value)


def admit(draft: Draft, config: VmConfig) -> None:
    """Make the last vCPU of a grown configuration: its record, with what its siblings were given meanwhile."""
    position = len(config.vcpus) - 1
    if position >= frames.records(draft.machine):
        _make(draft, config, position)
    m = draft.machine
    caps = m.caps.copy()
    count(caps, config, frames.records(m))
    draft.machine = m = m.replaced(caps=caps, vcpu_of_id=positions(config))
    for name, word in SHARED_REGISTERS.items():
        frames.write_word(m, FIRST_VCPU_FRAME + position, word, signed(RESET_REGISTERS[name]))


def _make(draft: Draft, config: VmConfig, position: int) -> None:
    frames.place_frame(draft.machine, int(FIRST_VCPU_FRAME) + position, frames.VCPU)
    queue = np.zeros((1, *draft.machine.queues.shape[1:]), dtype=np.int64)
    draft.machine = draft.machine.replaced(queues=np.concatenate([draft.machine.queues, queue]))
    fill(draft.machine, config, position)
    if register(draft.machine, reg.SPPT_TREES):
        if kvm_version(config.profile).subpages.sppt_per_vcpu:
            _add_tree(draft, position)
        spp_control.enable(draft.machine, position)
    below = kvm_on_hyperv.HypervHost.under(config)
    draft.ensure()
    if below is not None:
        kvm_on_hyperv.build(draft.machine, range(position, position + 1), below)
    page_logs.follow_siblings(draft.machine, position)


def _add_tree(draft: Draft, position: int) -> None:
    """A tree that says what that of the first vCPU says."""
    root = int(sppt_roots.root_frame(draft.machine, 0))
    twin = _copied(draft, root, int(sppt_tables.ROOT_LEVEL), {})
    frames.write_word(draft.machine, FIRST_VCPU_FRAME + position, ctl.V_SPPT_ROOT, twin)
    frames.write_word(draft.machine, frames.STATE_FRAME, reg.SPPT_TREES, position + 1)


def _copied(draft: Draft, frame: int, level: int, twins: dict[tuple[int, int], int]) -> int:
    """A copy of a table at a level and of those of KVM below it; ``twins`` are the copies so far.

    Entries of a client may lead to one table many times, and back to the root.
    """
    if (frame, level) in twins:
        return twins[frame, level]
    draft.ensure()
    twin = twins[frame, level] = int(frames.new_frame(draft.machine, frames.SPPT))
    words = draft.machine.rows[draft.machine.row_of[frame]].copy()
    for index in np.flatnonzero(words & ept.ADDRESS) if level > 1 else ():
        below = int(frame_at(draft.machine, words[index] & ept.ADDRESS))
        if below >= 0 and draft.machine.kind[below] == frames.SPPT:
            address = int(frames.address_of(draft.machine, _copied(draft, below, level - 1, twins)))
            words[index] = words[index] & ~np.int64(ept.ADDRESS) | address
    draft.machine.rows[draft.machine.row_of[twin]] = words
    return twin
