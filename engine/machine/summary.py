"""What a machine is, without what is in it: enough to list it, and found in its head alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.kvm.slots import SlotSpec
from engine.machine.nested_states import first_identity, states_from_head
from engine.state.config import VmConfig
from engine.state.head import config_from_head


@dataclass(frozen=True, slots=True)
class Summary:
    """One state of a machine. ``identities`` are VP index and CPUID of each vCPU in the order of the configuration,
    ``failing`` which allocation of the host fails from now, 1 the next."""

    config: VmConfig
    slots: tuple[SlotSpec, ...]
    identities: tuple[tuple[int, tuple[CpuidEntry, ...]], ...]
    spp_active: bool
    failing: int | None


def summary_to_head(*, spp_active: bool, failing: int | None) -> dict[str, Any]:
    """Those parts of a summary that a head does not have anyway: they are words of frames."""
    return {"spp_active": spp_active, "failing": failing}


def summary_from_head(head: Mapping[str, Any]) -> Summary | None:
    """The summary of the machine that wrote ``head``; None if it did so before it was part of a head."""
    kept = head.get("outline")
    if kept is None:
        return None
    config = config_from_head(head["config"])
    touched = states_from_head(config, head.get("nested", {})).vcpus
    identities = (
        first_identity(item) if item.id not in touched else (touched[item.id].vp_index, touched[item.id].cpuid)
        for item in config.vcpus
    )
    slots = tuple(SlotSpec.of_row(row) for row in head["slots"])
    return Summary(config, slots, tuple(identities), kept["spp_active"], kept["failing"])
