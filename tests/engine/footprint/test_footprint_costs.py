"""What a footprint says of a policy is what a replay of the trace says, to the last count."""

from __future__ import annotations

import pytest

from engine.footprint.places import BYTES, SPANS
from tests.engine.footprint.asking import answers, cost_of, replayed, said, scene

PROFILES = ("kvm-2019", "kvm-latest")


def agree(seed: int, profile: str) -> None:
    """A replay and both levels answer alike; without bytes collateral may be unknown, but never wrong."""
    made = scene(seed, profile)
    wanted = answers(replayed(made.question, made.policy, made.records))
    assert said(cost_of(made.records, BYTES, made.question, made.policy)) == wanted
    coarse = said(cost_of(made.records, SPANS, made.question, made.policy))
    known = {
        name: (hits[0], wanted["by_object"][name][1] if hits[1] is None else hits[1], *hits[2:])
        for name, hits in coarse["by_object"].items()
    }
    assert {**coarse, "by_object": known} == wanted


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("seed", range(8))
def test_a_footprint_answers_as_a_replay_does(seed: int, profile: str) -> None:
    agree(seed, profile)


@pytest.mark.soak
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_many_footprints_answer_as_replays_do(first: int, profile: str) -> None:
    for seed in range(first, first + 100):
        agree(seed, profile)
