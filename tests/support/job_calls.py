"""Jobs over HTTP: what is posted, what came of it, and a gate that holds their replays."""

from __future__ import annotations

import threading
from typing import Any

import httpx2
import pytest

from service.runtime import jobs
from tests.contract.client import ContractClient
from tests.support.waiting import until

ASYNC = {"Prefer": "respond-async"}
WRITES = {"accesses": [{"gpa": 0x1000}, {"gpa": 0x2000}]}


def ended(client: ContractClient, url: str, **options: Any) -> dict[str, Any]:
    """The job when it has ended."""
    until(lambda: client.get(url, **options).json()["state"] not in ("queued", "running"))
    return client.get(url, **options).json()


def post(client: ContractClient, vm: str, accesses: Any = WRITES, **headers: str) -> httpx2.Response:
    return client.post(f"{vm}/traces", json=accesses, headers=ASYNC | headers)


class Gate:
    """Holds replays of jobs at each of their looks, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.begun: list[str] = []
        real = jobs.replay

        def held(machine: Any, wanted: Any, source: Any, check: Any, *others: Any) -> Any:
            self.begun.append(wanted.format)

            def look() -> None:
                while not self.opened.wait(0.005):
                    check()
                check()

            return real(machine, wanted, source, look, *others)

        monkeypatch.setattr(jobs, "replay", held)
