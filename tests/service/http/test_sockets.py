"""Openings of WebSockets that come to nothing: a problem each, and nothing in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.http.frames import PatientSocket
from service.security.tokens import MemoryTokens, mint
from service.server import configured
from service.settings import Settings
from tests.support.server import Running, running


@pytest.fixture(autouse=True)
def _uvicorn_is_heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Its loggers do not propagate."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def refused(service: Running, path: str) -> dict[str, object]:
    """The problem that an opening is answered with."""
    with pytest.raises(InvalidStatus) as error, connect(f"ws://127.0.0.1:{service.port}{path}"):
        pass
    response = error.value.response
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, object] = json.loads(response.body)
    assert problem["status"] == response.status_code
    return problem


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1/vms", "/static/swagger-ui/LICENSE", "/docs", "/v1/vms/x/y"])
def test_a_path_that_is_none(path: str, service: Running, caplog: pytest.LogCaptureFixture) -> None:
    problem = refused(service, path)
    assert (problem["code"], problem["instance"]) == ("not-found", path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_refusals_are_no_errors_of_the_service(caplog: pytest.LogCaptureFixture) -> None:
    tokens = MemoryTokens()
    record, _ = mint("red", tenant="red", scope="write", now=datetime.now(UTC))
    tokens.add(record)
    with running(Settings(warm_up=False), tokens) as service:
        logging.getLogger("uvicorn").addHandler(caplog.handler)  # the server has configured it anew
        for _ in range(20):
            assert refused(service, "/v1/vms/vm_0/introspection")["code"] == "unauthenticated"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_server_has_the_same_connections(service: Running) -> None:
    assert configured(service.app, Settings()).ws is PatientSocket
