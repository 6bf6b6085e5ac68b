"""Footprints by the client: advice and sums, blocking and awaited, and how it is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import subpage
from subpage import AsyncClient

POLICY = {"name": "p", "objects": [{"name": "o", "gpa": 0x10040, "size": 8}]}


def test_sums_and_advice(client: subpage.Client) -> None:
    one = client.create_footprint([0x10040, 0x10000], level="bytes", name="one")
    two = client.create_footprint([0x10000, 0x20000], level="bytes", name="two")
    both, other = client.merge_footprints([one, two]), client.merge_footprints([two.id, one.id])
    assert isinstance(both, subpage.Footprint) and both["traces_total"] == 2
    assert both.parquet() == other.parquet() and both.id != other.id
    advice = both.advise(POLICY, memory_slots=[{"gpa": 0, "size": 1 << 20}], per_million=500_000, profile="kvm-latest")
    assert advice["profile"] == "kvm-latest" and advice["neighbours"]["o"][0]["violations"] == 2
    assert [(edit["action"], edit["saves"]) for edit in advice["advice"]] == [("move", 2)]
    assert advice["within_budget"]["exits"] == 2.0 and advice["within_budget"]["dropped"] == ["o"]
    assert both.costs([POLICY])[0]["violations"] == advice["cost"]["violations"] == 3


def test_refusals_are_told(client: subpage.Client) -> None:
    spans = client.create_footprint([0x10040])
    with pytest.raises(subpage.NotFound) as refused:
        client.merge_footprints([spans, "fp_0123456789abcdef"])
    assert refused.value.field == "footprints[1]" and refused.value.value == "fp_0123456789abcdef"
    with pytest.raises(subpage.Problem, match="must be bytes"):
        spans.advise(POLICY)


def test_awaited(server: Any) -> None:
    async def work() -> None:
        async with AsyncClient(server.url) as client:
            one = await client.create_footprint([0x10040, 0x10000], level="bytes")
            both = await client.merge_footprints([one, one])
            assert both["records"] == 4 and (await both.advise(POLICY))["advice"][0]["saves"] == 2

    asyncio.run(work())
