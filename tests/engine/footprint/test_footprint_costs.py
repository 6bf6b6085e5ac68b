"""What a footprint says of a policy is what a replay of the trace says, to the last count."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidValue
from engine.footprint.costs import Costs, runs_of
from engine.footprint.places import BYTES, SPANS
from engine.footprint.question import Question
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection
from engine.kvm.slots import SlotSpec
from tests.engine.footprint.asking import answers, cost_of, footprint_of, replayed, said, scene

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


@pytest.mark.parametrize("profile", PROFILES)
def test_large_pages_are_not_enforced_by_the_first_series(profile: str) -> None:
    """Nor where an access goes on from one to a page that is."""
    end = 1 << 21
    question = Question((SlotSpec(0, 0, end, False, 1 << 21), SlotSpec(1, end, 0x1000)), profile)
    policy = Protection("p", (ProtectedObject("large", end - 64, 64), ProtectedObject("small", end, 64)))
    stores = [(gpa, 8 | 1 << 16) for gpa in (end - 8, end - 8, end - 4, end, end + 256)]
    records = np.array(stores, dtype=np.uint64)
    found = said(cost_of(records, BYTES, question, policy))
    assert found == answers(replayed(question, policy, records))
    assert (found["violations"], found["unenforced_writes"]) == ((2, 2) if profile == "kvm-2019" else (4, 0))


@pytest.mark.soak
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_many_footprints_answer_as_replays_do(first: int, profile: str) -> None:
    for seed in range(first, first + 100):
        agree(seed, profile)


def test_pages_without_a_slot_are_told_by_policy_and_position() -> None:
    ranges = tuple(ProtectedPages(gfn, 1, 0) for gfn in (0, 3, 4))
    policies = [Protection("one", (), ranges[:1]), Protection("two", (), ranges)]
    costs = Costs(footprint_of(scene(0, PROFILES[0]).records, SPANS), Question((SlotSpec(0, 0, 0x4000),)))
    with pytest.raises(InvalidValue, match="GFN 0x4 has none") as caught:
        costs.of(policies)
    assert caught.value.field == "policies[1].pages[2][0]"


def test_many_policies_at_a_time_answer_as_each_alone_and_can_be_ended() -> None:
    made = scene(3, PROFILES[0])
    policies = [made.policy, Protection("torn", (), (ProtectedPages(made.policy.objects[0].first_gfn, 1, 0x5A5A5A5A),))]
    assert runs_of(policies[1:]) == 13
    costs = Costs(footprint_of(made.records, BYTES), made.question)
    alone = [costs.of([policy])[0] for policy in policies]
    assert costs.of(policies * 40) == alone * 40

    def gone(size: int) -> None:
        nonlocal looks
        looks -= 1
        if not looks:
            raise TimeoutError

    looks = 100
    with pytest.raises(TimeoutError):
        costs.of(policies * 40, gone)
