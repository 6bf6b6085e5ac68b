"""Whether a host lets sub-page protection be switched on: the tests of KVM_INIT_SPP and KVM_ENABLE_CAP, in order.

Of the tests that a profile names, those here are of the host; flags are the caller's, and that SPP is active already,
or that memory runs out, is found out on the way (kvm-spp 2.1).
"""

from __future__ import annotations

from engine.errors import Conflict, NotEnabled, Unsupported
from engine.state.config import HostConfig, VmConfig
from engine.state.profiles import kvm_version


def allows_nesting(config: VmConfig) -> bool:
    """Whether the host allows nesting; unset, it is as sub-page protection needs it."""
    return bool(config.host.nested)


def not_enabled(why: str = "", *, field: str = "spp", value: object = False, errno: str | None = None) -> NotEnabled:
    """What every call that needs sub-page protection says while it is off; ``why`` says what needs it."""
    rule = "must be on: switch sub-page protection on first, with PUT …/spp"
    return NotEnabled(f"{rule}; {why}" if why else rule, field=field, value=value, errno=errno)


def check(config: VmConfig, nesting_in_use: bool = False) -> None:
    """Raise what the profile's enabling call returns on this host: Unsupported or Conflict.

    Where ``host.nested`` is not set, nesting is off once sub-page protection is on, unless a vCPU uses it already.
    """
    profile = kvm_version(config.profile).subpages
    for test in profile.enable_tests:
        if test == "support" and not config.host.supports_spp:
            raise _unsupported(config.host, profile.unsupported_errno)
        if test == "nested" and (allows_nesting(config) or (config.host.nested is None and nesting_in_use)):
            rule = "must be false: sub-page protection excludes nesting"
            if not allows_nesting(config):
                rule = "must not be in use: a vCPU is in VMX operation or has its enlightened VMCS enabled"
            raise Conflict(rule, field="host.nested", value=True, errno=profile.nested_errno)


def _unsupported(host: HostConfig, errno: str) -> Unsupported:
    """What the host lacks for sub-page protection; another host is another machine."""
    needs = "sub-page protection needs it, and a machine keeps its host: create another"
    if host.vendor != "intel":
        return Unsupported(f"must be intel: {needs}", field="host.vendor", value=host.vendor, errno=errno)
    lacks = "spp" if host.ept else "ept"
    return Unsupported(f"must be true: {needs}", field=f"host.{lacks}", value=False, errno=errno)
