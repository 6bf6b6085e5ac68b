"""Hostile values in every place of every operation: each is answered as the contract says, and never with a 500."""

from __future__ import annotations

import os
import random

import pytest

from tests.abuse.hostile import attack
from tests.abuse.process import Service
from tests.contract.client import contract

_OPERATIONS = sum(len(item) for item in contract().document["paths"].values())


def test_each_operation_some_times(victim: Service) -> None:
    statuses = attack(victim, seed=random.randrange(1 << 30), count=4 * _OPERATIONS)
    assert statuses[422] > _OPERATIONS and statuses[200] > 10 and set(statuses) > {400, 404}, statuses


@pytest.mark.abuse
def test_minutes_of_them(victim: Service) -> None:
    seed = int(os.environ.get("SEED", "1"))
    statuses = attack(victim, seed=seed, seconds=60 * float(os.environ.get("MINUTES", "10")))
    assert sum(statuses.values()) > _OPERATIONS
