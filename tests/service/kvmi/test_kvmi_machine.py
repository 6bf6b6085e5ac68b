"""What a connection is told of a machine that cannot answer: an error of that query, never an exception."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from engine.errors import Conflict, EngineError, InvalidValue
from service.kvmi.machine import MachineGuest
from service.kvmi.wire import EINVAL, EOPNOTSUPP, NO_ADDRESS, Refused

LOST = Conflict("the file behind the slot is shorter than the slot", field="gpa", value=0)
NESTED = InvalidValue("must not be in guest mode", field="vcpu", value=0)
NOWHERE = InvalidValue("must translate", field="gva", value="0x1000")


def guest(error: EngineError) -> MachineGuest:
    """Of a machine whose every answer is an error."""

    def fails(*_: Any) -> NoReturn:
        raise error

    machine = SimpleNamespace(
        config=SimpleNamespace(vcpus=[SimpleNamespace(id=0)]),
        guest_walk=fails,
        read_in_page=fails,
        page_access=SimpleNamespace(read=fails),
        nested=SimpleNamespace(registers_version=fails),
    )
    entry: Any = SimpleNamespace(machine=machine)
    return MachineGuest(entry)


def test_errors_are_of_the_query() -> None:
    for error, errno in ((LOST, EOPNOTSUPP), (NESTED, EINVAL)):
        asked = guest(error)
        for query in (
            lambda: asked.read(0, 8),  # noqa: B023
            lambda: asked.page(0),  # noqa: B023
            lambda: asked.registers(0, ()),  # noqa: B023
        ):
            with pytest.raises(Refused) as refused:
                query()
            assert refused.value.errno == errno


def test_an_event_shows_zeros_where_registers_cannot_be_read() -> None:
    shown = guest(LOST).shown(0)
    assert (len(shown.regs), len(shown.sregs), len(shown.msrs), shown.cr3, shown.mode) == (144, 312, 9, 0, 2)


def test_an_address_without_a_translation_is_told_from_one_that_cannot_be_looked_up() -> None:
    assert guest(NOWHERE).translate(0, 0x1000) == NO_ADDRESS
    for error in (NESTED, LOST):
        with pytest.raises(Refused) as refused:
            guest(error).translate(0, 0x1000)
        assert refused.value.errno == EOPNOTSUPP
