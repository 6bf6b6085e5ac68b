"""One tree for everything the engine refuses.

Every error names the field, the offending value and the rule, so that a caller can print it, a client can match on
``code`` and the ioctl façade can answer with ``errno``. Raising one leaves the machine as it was.
"""

from __future__ import annotations

from typing import Any


class EngineError(Exception):
    """Base of the tree.

    ``code`` is a stable slug, ``errno`` the Linux name of the nearest kernel error, ``field`` the dotted name of the
    input, ``value`` what was given, ``rule`` one sentence saying what would have been accepted.
    """

    code = "engine-error"
    errno = "EINVAL"

    def __init__(
        self,
        rule: str,
        *,
        field: str | None = None,
        value: Any = None,
        code: str | None = None,
        errno: str | None = None,
    ) -> None:
        super().__init__(rule)
        self.rule = rule
        self.field = field
        self.value = value
        if code is not None:
            self.code = code
        if errno is not None:
            self.errno = errno


class InvalidValue(EngineError):
    """A well-formed input that breaks a rule."""

    code = "invalid-value"


class TraceError(InvalidValue):
    """A record of a trace that no processor could have produced, or a body that cannot be decoded.

    ``index`` is the absolute position of the record in the trace, or None when the body as a whole is at fault.
    """

    code = "invalid-trace"

    def __init__(self, rule: str, *, index: int | None = None, field: str | None = None, value: Any = None) -> None:
        super().__init__(rule, field=field, value=value)
        self.index = index


class NotFound(EngineError):
    """The named thing does not exist."""

    code = "not-found"
    errno = "ENOENT"


class Conflict(EngineError):
    """The machine is in a state in which the operation is not defined."""

    code = "conflict"
    errno = "EBUSY"


class NotEnabled(Conflict):
    """Sub-page protection is used before it was enabled."""

    code = "spp-not-enabled"
    errno = "ENODEV"


class Unsupported(Conflict):
    """The host that was described at creation does not offer the feature."""

    code = "unsupported"
    errno = "ENODEV"


class Busy(Conflict):
    """Another mutation of the same machine is under way."""

    code = "vm-busy"


class LimitExceeded(EngineError):
    """A configured limit would be passed."""

    code = "limit-exceeded"
    errno = "ENOMEM"


class OutOfMemory(EngineError):
    """The host of the machine could not allocate: it was told to fail."""

    code = "out-of-memory"
    errno = "ENOMEM"
