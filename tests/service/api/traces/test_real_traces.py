"""What a real guest wrote, over HTTP, against answers that were computed independently with numpy."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import bodies, recorded
from tests.support.bodies import Body
from tests.support.http import replayed
from tests.support.server import running

pytestmark = pytest.mark.jit

TRUTH = json.loads(recorded.TRUTH.read_text(encoding="utf-8"))
TRACES = ("boot", "user")
POLICIES = ("kernel_control_data", "kernel_text_and_data", "hot_pages_stress")
GIB = 1 << 30


@pytest.fixture(scope="module")
def client() -> Iterator[ContractClient]:
    # Results are dropped at once: the exit records of eighteen replays of a kernel boot are a few hundred megabytes.
    with running(Settings(warm_up=False, kept_traces=1)) as service:
        yield service.client


@pytest.fixture
def vm(client: ContractClient) -> Iterator[str]:
    slot = {"slot": 0, "gpa": 0, "size": GIB}
    url = client.post("/v1/vms", json={"spp": True, "memory_slots": [slot]}).headers["Location"]
    yield url
    client.delete(url)


@functools.cache
def columns(trace: str) -> pa.Table:
    return pq.read_table(recorded.trace(trace), columns=["gpa", "size", "vcpu"])


@functools.lru_cache(maxsize=1)
def body(trace: str, name: str) -> Body:
    if name == "parquet":
        return Body(recorded.trace(trace).read_bytes(), bodies.PARQUET)
    return bodies.FORMATS[name](columns(trace))


def protect(client: ContractClient, vm: str, policy: str) -> None:
    headers = {"Content-Type": "application/json"}
    reply = client.post(f"{vm}/protections", content=recorded.policy(policy).read_bytes(), headers=headers)
    assert reply.status_code == 201, reply.text


def indices(client: ContractClient, vm: str, result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The indices of all violations, as a client gets them: one Arrow stream."""
    reply = client.get(f"{vm}/traces/{result['id']}/exits", headers={"Accept": bodies.ARROW})
    found: np.ndarray[Any, np.dtype[np.uint64]] = pa.ipc.open_stream(reply.content).read_all()["index"].to_numpy()
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["parquet", "arrow", "packed"])
@pytest.mark.parametrize("trace", TRACES)
def test_ground_truth(client: ContractClient, vm: str, trace: str, name: str, policy: str) -> None:
    protect(client, vm, policy)
    result = replayed(client, vm, body(trace, name))
    truth = TRUTH[policy][f"{trace}.parquet"]
    assert result["records"] == truth["records"]
    assert result["violations"] == truth["violations"]
    assert result["page_granular_violations"] == truth["page_granular_violations"]
    hit = {
        label: {"violations": found["violations"], "collateral": found["collateral"]}
        for label, found in result["by_object"].items()
        if found["violations"]
    }
    assert hit == {label: found for label, found in truth["by_object"].items() if found["violations"]}
    found = indices(client, vm, result)
    assert hashlib.sha256(found.astype("<u8").tobytes()).hexdigest() == truth["indices_sha256"]
    assert found[:5].tolist() == truth["first_indices"][:5]
    for label, hits in result["by_object"].items():
        assert (hits["first_index"] is None) == (label not in hit)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trace", TRACES)
def test_json_says_the_same(client: ContractClient, vm: str, trace: str, policy: str) -> None:
    """On the first 200,000 records: as text they are a hundred times larger than as Parquet."""
    protect(client, vm, policy)
    first = columns(trace)[:200_000]
    totals = ("records", "violations", "page_granular_violations", "mmio", "by_object")
    expected = replayed(client, vm, bodies.arrow(first))
    hits = indices(client, vm, expected)
    truth = TRUTH[policy][f"{trace}.parquet"]["first_indices"]
    assert hits[: len(truth)].tolist() == [index for index in truth if index < len(first)]
    for name in ("json", "ndjson"):
        result = replayed(client, vm, bodies.FORMATS[name](first))
        assert {total: result[total] for total in totals} == {total: expected[total] for total in totals}
        assert np.array_equal(indices(client, vm, result), hits)


@pytest.mark.parametrize("seed", [1, 2])
def test_any_split_gives_the_same_total(client: ContractClient, vm: str, seed: int) -> None:
    protect(client, vm, "kernel_control_data")
    whole = columns("boot")
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(whole), 5)).tolist()
    truth = TRUTH["kernel_control_data"]["boot.parquet"]
    hits: list[int] = []
    totals = {"records": 0, "violations": 0, "page_granular_violations": 0}
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        result = replayed(client, vm, bodies.packed(whole[start:end]))
        hits += (indices(client, vm, result) + start).tolist()
        for total in totals:
            totals[total] += result[total]
    assert totals == {total: truth[total] for total in totals}
    assert hashlib.sha256(np.array(hits, dtype="<u8").tobytes()).hexdigest() == truth["indices_sha256"]


def test_stop_and_resume_give_the_same_total(client: ContractClient, vm: str) -> None:
    protect(client, vm, "kernel_control_data")
    first = bodies.packed(columns("boot")[:30_000])
    expected = indices(client, vm, replayed(client, vm, first)).tolist()
    stops: list[int] = []
    start = 0
    while (result := replayed(client, vm, first, f"on_violation=stop&start={start}"))["stopped_at"] is not None:
        stops.append(result["stopped_at"])
        start = stops[-1] + 1
    assert stops == expected and expected
