"""Whether a host lets sub-page protection be switched on: the tests of KVM_INIT_SPP and KVM_ENABLE_CAP, in order.

Of the tests that a profile names, those here are of the host; flags are the caller's, and that SPP is active already,
or that memory runs out, is found out on the way (kvm-spp 2.1).
"""

from __future__ import annotations

from engine.config import VmConfig
from engine.errors import Conflict, Unsupported
from engine.kvm.profile import profile_of


def allows_nesting(config: VmConfig) -> bool:
    """Whether the host allows nesting; unset, it is as sub-page protection needs it."""
    return bool(config.host.nested)


def check(config: VmConfig, nesting_in_use: bool = False) -> None:
    """Raise what the profile's enabling call returns on this host: Unsupported or Conflict.

    Where ``host.nested`` is not set, nesting is off once sub-page protection is on, unless a vCPU uses it already.
    """
    profile = profile_of(config.profile)
    for test in profile.enable_tests:
        if test == "support" and not config.host.supports_spp:
            raise Unsupported(
                "sub-page protection needs an Intel host with EPT and SPP",
                field="host",
                value=config.host.vendor,
                errno=profile.unsupported_errno,
            )
        if test == "nested" and (allows_nesting(config) or (config.host.nested is None and nesting_in_use)):
            raise Conflict(
                "sub-page protection excludes nesting", field="host.nested", value=True, errno=profile.nested_errno
            )
