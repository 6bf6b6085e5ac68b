"""The list of faults fits the sources: each fault can be put in, is Python, and names tests that are there."""

from __future__ import annotations

from tests.mutants.__main__ import MUTANTS, check_list
from tests.support.functions import functions_of


def test_every_fault_can_be_put_in() -> None:
    check_list(MUTANTS)


def test_every_test_that_is_named_is_there() -> None:
    for mutant in MUTANTS:
        for test in mutant.tests:
            file, _, function = test.partition("::")
            assert function.partition("[")[0] in functions_of(file), (mutant.id, test)


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 40
