"""One tree of errors: field, value, rule, a stable code and the nearest errno."""

from __future__ import annotations

import pytest

from engine import errors

CODES = [
    (errors.EngineError, "engine-error", "EINVAL"),
    (errors.InvalidValue, "invalid-value", "EINVAL"),
    (errors.TraceError, "invalid-trace", "EINVAL"),
    (errors.NotFound, "not-found", "ENOENT"),
    (errors.Conflict, "conflict", "EBUSY"),
    (errors.NotEnabled, "spp-not-enabled", "ENODEV"),
    (errors.Unsupported, "unsupported", "ENODEV"),
    (errors.Busy, "vm-busy", "EBUSY"),
    (errors.LimitExceeded, "limit-exceeded", "ENOMEM"),
]


@pytest.mark.parametrize(("kind", "code", "errno"), CODES)
def test_error_names_itself(kind: type[errors.EngineError], code: str, errno: str) -> None:
    error = kind("a rule", field="gpa", value=3)
    assert (error.code, error.errno, error.field, error.value, error.rule) == (code, errno, "gpa", 3, "a rule")
    assert str(error) == "a rule" and isinstance(error, errors.EngineError)
    assert (kind("a rule").field, kind("a rule").value) == (None, None)


def test_one_error_may_be_more_precise_than_its_kind() -> None:
    error = errors.Conflict("a rule", code="taken", errno="EEXIST")
    assert (error.code, error.errno) == ("taken", "EEXIST")
    assert (errors.Conflict("a rule").code, errors.Conflict("a rule").errno) == ("conflict", "EBUSY")


def test_trace_error_knows_its_record() -> None:
    assert errors.TraceError("a rule", index=7).index == 7
    assert errors.TraceError("a rule").index is None
    assert isinstance(errors.TraceError("a rule"), errors.InvalidValue)
