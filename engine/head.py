"""The configuration and the protections of a machine as JSON, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple
from typing import Any

from engine.config import HostConfig, VcpuConfig, VmConfig
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection


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


_PLAIN = ("subpage", None, None)


def protection_to_head(protection: Protection) -> dict[str, Any]:
    """A protection as JSON-able values. What is not given is left out, as in heads from before it could be."""
    rows = [astuple(item) for item in protection.objects]
    values: dict[str, Any] = {
        "name": protection.name,
        "objects": [list(row[:3] if row[3:] == _PLAIN else row) for row in rows],
    }
    if protection.ranges:
        values["pages"] = [list(astuple(item)) for item in protection.ranges]
    if protection.about is not None:
        values["about"] = protection.about
    return values


def protection_from_head(values: Mapping[str, Any]) -> Protection:
    """The protection that ``protection_to_head`` wrote."""
    objects = tuple(ProtectedObject(*row) for row in values["objects"])
    ranges = tuple(ProtectedPages(*row) for row in values.get("pages", ()))
    return Protection(values["name"], objects, ranges, values.get("about"))
