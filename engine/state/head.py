"""The configuration of a machine as JSON, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.state.config import HostConfig, VcpuConfig, VmConfig


def config_to_head(config: VmConfig) -> dict[str, Any]:
    """A configuration as JSON-able values; capability words as hex strings, which survive any JSON reader."""
    values = asdict(config)
    host = values["host"]
    host["vmx_capabilities"] = {name: hex(word) for name, word in config.host.vmx_capabilities.items()}
    return values


def config_from_head(values: Mapping[str, Any]) -> VmConfig:
    """The configuration that ``config_to_head`` wrote."""
    host = dict(values["host"])
    host["vmx_capabilities"] = {name: int(word, 16) for name, word in host["vmx_capabilities"].items()}
    vcpus = tuple(VcpuConfig(v["id"], v["vp_index"], tuple(v["cpuid"])) for v in values["vcpus"])
    return VmConfig(**{**values, "host": HostConfig(**host), "vcpus": vcpus})
