"""One service for the session, one client with contract checks, machines made to measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from numba.core.dispatcher import Dispatcher

from engine.warm.steps import warm
from tests.contract.client import ContractClient
from tests.support.http import new_vm
from tests.support.job_calls import Gate
from tests.support.server import Running, running
from tests.support.store_fixtures import postgres, store_url

__all__ = ["postgres", "store_url"]


@pytest.fixture(scope="session")
def warmed() -> list[Any]:
    """Every kernel of the engine, once they are warm; none where they are plain Python."""
    warm()
    modules = [module for name, module in sys.modules.items() if name.startswith("engine.")]
    return [item for module in modules for item in vars(module).values() if isinstance(item, Dispatcher)]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(warmed: list[Any]) -> Iterator[None]:
    """A signature that ``warm`` leaves out would be compiled while a client waits, with the GIL held for seconds."""
    before = [_compiled(kernel) for kernel in warmed]
    yield
    compiled = [kernel for kernel, count in zip(warmed, before, strict=True) if _compiled(kernel) > count]
    assert not compiled, [(kernel.py_func.__qualname__, kernel.signatures[-1]) for kernel in compiled]


def _compiled(kernel: Any) -> int:
    """How many signatures were not found in the cache on disk."""
    return int(kernel._cache_misses.total())  # ``stats`` copies what it counts, six hundred kernels a test


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    with running() as started:
        yield started


@pytest.fixture
def client(service: Running) -> ContractClient:
    return service.client


@pytest.fixture
def make_vm(client: ContractClient) -> Iterator[Callable[..., str]]:
    """Creates a VM with 16 MiB of RAM at 0 and SPP enabled, unless told otherwise; returns its URL."""
    made: list[str] = []

    def make(**members: Any) -> str:
        made.append(new_vm(client, **members))
        return made[-1]

    yield make
    for url in made:
        tag = client.get(url)
        if tag.status_code == 200:
            client.delete(url, headers={"If-Match": tag.headers["ETag"]})


@pytest.fixture
def vm(make_vm: Callable[..., str]) -> str:
    return make_vm()


@pytest.fixture
def narrow(make_vm: Callable[..., str]) -> str:
    """A VM of 40 physical-address bits, as the printed vectors have it."""
    return make_vm(maxphyaddr=40)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()
