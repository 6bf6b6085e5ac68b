"""Reads streams of events, as an EventSource or line by line; a stream that says nothing fails the test."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx2

from tests.contract.client import ContractClient
from tests.support.http import set_map

SSE = {"Accept": "text/event-stream"}
NDJSON = {"Accept": "application/x-ndjson"}
PATIENCE = 60.0


class Stream:
    """An open stream. ``last`` is what an EventSource would send as Last-Event-ID."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.last: int | None = None
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Events, the markers among them, to the end of the stream."""
        media = self.response.headers["content-type"].partition(";")[0]
        return self._sse() if media == "text/event-stream" else self._ndjson()

    def take(self, count: int) -> list[dict[str, Any]]:
        events = iter(self)
        return [next(events) for _ in range(count)]

    def _ndjson(self) -> Iterator[dict[str, Any]]:
        for line in self._lines:
            if line:
                yield json.loads(line)

    def _sse(self) -> Iterator[dict[str, Any]]:
        """As the HTML standard dispatches: a block without data is no event, but its id counts."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            if "id" in fields:
                self.last = int(fields["id"])
            if "data" in fields:
                event = json.loads(fields["data"])
                assert fields["event"] == event["kind"]
                assert "id" not in fields if event["id"] is None else int(fields["id"]) == event["id"]
                yield event
            fields = {}


@contextlib.contextmanager
def following(url: str, headers: dict[str, str] = SSE, **params: Any) -> Iterator[Stream]:
    """A stream of the log at ``url``."""
    with httpx2.stream("GET", url, headers=headers, params=params, timeout=PATIENCE) as response:
        assert response.status_code == 200, response.read()
        yield Stream(response)


def log(client: ContractClient, vm: str, **params: Any) -> list[dict[str, Any]]:
    """The whole log by way of its pages, which must fit together."""
    found: list[dict[str, Any]] = []
    page = client.get(f"{vm}/events", params=params).json()
    while True:
        found += page["events"]
        if page["next"] is None:
            return found
        page = client.get(page["next"]).json()


def refuse(client: ContractClient, vm: str, count: int, **params: Any) -> str:
    """Post a trace of ``count`` writes to page 1 that are refused and as many to page 8 that are not; its id."""
    set_map(client, vm, 1, 0)
    accesses = [{"gpa": page << 12 | at % 512 << 3} for at in range(count) for page in (8, 1)]
    reply = client.post(f"{vm}/traces", params=params, json={"accesses": accesses})
    assert reply.status_code == 201 and reply.json()["violations"] == count
    return str(reply.json()["id"])
