"""A short run of the fuzzer; `make api-fuzz` is the long one. And that it would notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.contract import fuzz
from tests.contract.fuzz_hooks import HOSTILE_HEADERS, RAM, folded, hostile, map_headers
from tests.support.hostile_numbers import HOSTILE_NUMBERS

# Chains of calls, and not seconds: a busy machine is no reason to try less.
LIMITS = ("--max-examples", "6")


def test_short_run(tmp_path: Path) -> None:
    log: list[str] = []
    output = tmp_path / "output.txt"
    with output.open("w", encoding="utf-8") as file, fuzz.server(log) as url:
        report = fuzz.run(url, tmp_path, "stateful", seed=None, output=file, options=LIMITS)
        routes, successes = fuzz.succeeded(url)
    line, clean = fuzz.summary(report, log, routes, successes, whole=False)
    assert clean, f"{line}\n{log[-20:]}\n{output.read_text(encoding='utf-8')}"
    assert "POST /v1/vms" in routes and len(routes) > 5, line


def test_what_is_clean() -> None:
    report: dict[str, Any] = {
        "test_cases": {"generated": 9},
        "operations": {"tested": 2, "total": 2},
        "failures": [],
        "errors": [],
    }
    line = (
        "cases: 9, operations: 2 of 2, 1 of them with a success, 3 successes, failures: 0, errors: 0, "
        "lines logged by the server: 0"
    )
    assert fuzz.summary(report, [], {"GET /v1/vms"}, 3) == (line, True)
    for change in (
        {"test_cases": {"generated": 0}},
        {"operations": {"tested": 1, "total": 2}},
        {"failures": [{"count": 1}]},
        {"errors": [{"count": 1}]},
    ):
        assert not fuzz.summary({**report, **change}, [], set(), 0)[1]
    assert not fuzz.summary(report, ["an exception"], set(), 0)[1]
    assert fuzz.summary({**report, "operations": {"tested": 1, "total": 2}}, [], set(), 0, whole=False)[1]


def test_half_of_the_addresses_meet_ram() -> None:
    assert folded({"gpa": hex(RAM + 6), "memory": [{"addr": hex(3 * RAM)}]}) == {
        "gpa": "0x6",
        "memory": [{"addr": "0x0"}],
    }
    assert folded({"gpa": hex(RAM + 7), "gfn": RAM, "size": "0x1000"}) == {
        "gpa": hex(RAM + 7),
        "gfn": "0x0",
        "size": "0x1",
    }
    odd = {"gpa": "none", "npages": -2, "name": "0x10", "gfn": None, "access": [1, "0x2"], "size": 8}
    assert folded(odd) == odd


def test_some_numbers_and_headers_are_hostile() -> None:
    """The same ones every time; what is no number stays as it is."""
    asked = [{"gfn": hex(number), "cursor": "a"} for number in range(1, 400, 2)]
    changed = [hostile(query) for query in asked]
    assert changed == [hostile(query) for query in asked] and {query["cursor"] for query in changed} == {"a"}
    assert 5 < sum(query["gfn"] in HOSTILE_NUMBERS for query in changed) < 50
    context: Any = None
    added = [map_headers(context, {"If-Match": str(number)}) for number in range(200)]
    assert 20 < sum(len(headers) == 2 for headers in added) < 90
    assert {pair for headers in added for pair in headers.items() if pair[0] != "If-Match"} <= set(HOSTILE_HEADERS)
    assert map_headers(context, None) is None
