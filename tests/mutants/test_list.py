"""The list of faults fits the sources: each fault can be put in, and is Python."""

from __future__ import annotations

from tests.mutants.__main__ import MUTANTS, check_list


def test_every_fault_can_be_put_in() -> None:
    check_list(MUTANTS)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 40
