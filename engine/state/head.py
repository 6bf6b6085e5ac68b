"""The configuration of a machine as JSON, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

from engine.state.config import HostConfig, VcpuConfig, VmConfig

T = TypeVar("T")

# Where an object that does not change has its text.
_TEXT = "_text"

# What a vCPU is as if nothing had been given, as releases before format 2 wrote it.
_LEFT_OUT: tuple[tuple[str, Any], ...] = (("vp_index", None), ("cpuid", []))


def config_to_head(config: VmConfig) -> dict[str, Any]:
    """A configuration as JSON-able values; capability words as hex strings, which survive any JSON reader."""
    values = asdict(replace(config, vcpus=()))
    values["vcpus"] = [_vcpu_to_head(vcpu) for vcpu in config.vcpus]
    host = values["host"]
    host["vmx_capabilities"] = {name: hex(word) for name, word in config.host.vmx_capabilities.items()}
    return values


def config_text(config: VmConfig) -> str:
    """The same as text, made once: a machine may have a thousand vCPUs."""
    return kept_text(config, config_to_head)


def kept_text(item: T, to_head: Callable[[T], Any]) -> str:
    """The text of what does not change, made once and kept with it."""
    kept: dict[str, Any] = vars(item)
    if _TEXT not in kept:
        kept[_TEXT] = json.dumps(to_head(item))
    text: str = kept[_TEXT]
    return text


def _vcpu_to_head(vcpu: VcpuConfig) -> dict[str, Any]:
    """What of it is not as if nothing had been given."""
    head: dict[str, Any] = {"id": vcpu.id}
    if vcpu.vp_index is not None:
        head["vp_index"] = vcpu.vp_index
    if vcpu.cpuid:
        head["cpuid"] = asdict(vcpu)["cpuid"]
    if vcpu.reset:
        head["reset"] = True
    return head


def config_head_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config_to_head`` writes where an earlier release wrote ``values``, with every member of a vCPU."""
    return {**values, "vcpus": [_without_defaults(vcpu) for vcpu in values["vcpus"]]}


def _without_defaults(vcpu: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in vcpu.items() if (name, value) not in _LEFT_OUT}


def config_from_head(values: Mapping[str, Any]) -> VmConfig:
    """The configuration that ``config_to_head`` wrote."""
    host = dict(values["host"])
    host["vmx_capabilities"] = {name: int(word, 16) for name, word in host["vmx_capabilities"].items()}
    vcpus = tuple(VcpuConfig(**{**v, "cpuid": tuple(v.get("cpuid", ()))}) for v in values["vcpus"])
    return VmConfig(**{**values, "host": HostConfig(**host), "vcpus": vcpus})
