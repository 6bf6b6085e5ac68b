"""Metrics, logs, readiness, and the way a service ends."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.app import create_app
from service.security.tokens import MemoryTokens, mint
from service.server import Refused, check_telemetry
from service.settings import MIB, Settings
from service.telemetry.logs import JsonFormatter, TextFormatter, configuration, request_id
from service.telemetry.metrics import EXIT_KINDS, Metrics
from tests.contract.client import ContractClient
from tests.support.processes import process
from tests.support.server import Running, running


@pytest.fixture
def own() -> Iterator[Running]:
    with running(Settings(warm_up=False)) as service:
        yield service


def samples(client: ContractClient) -> list[Sample]:
    reply = client.get("/metrics")
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return [sample for family in text_string_to_metric_families(reply.text) for sample in family.samples]


def value(client: ContractClient, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    found = [sample for sample in samples(client) if sample.name == name and labels.items() <= sample.labels.items()]
    return sum(sample.value for sample in found)


def test_exits_and_writes(own: Running) -> None:
    client = own.client
    home = client.post(
        "/v1/vms", json={"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}]}
    ).headers["Location"]
    client.put(f"{home}/subpages?gfn=0x10", json={"access": ["0xfffffffe"]})
    lines = b'{"gpa": "0x10000"}\n' * 3 + b'{"gpa": "0x20000"}\n{"gpa": "0x20000", "access": 0}\n'
    result = client.post(f"{home}/traces", content=lines, headers={"Content-Type": "application/x-ndjson"}).json()
    assert value(client, "subpage_replayed_records_total") == 5 and value(client, "subpage_replayed_writes_total") == 4
    assert value(client, "subpage_violations_total") == result["violations"] == 3
    for kind in EXIT_KINDS:
        assert value(client, "subpage_exits_total", kind=kind) == result["exits"][kind]
    access = client.post(f"{home}/accesses", json={"gpa": "0x30000", "access": "write"}).json()
    assert access["exits"] and {row["reason"] for row in access["exits"]} == {48}
    expected = result["exits"]["ept_violation"] + len(access["exits"])
    assert value(client, "subpage_exits_total", kind="ept_violation") == expected


def test_every_kind_of_exit_is_counted(own: Running) -> None:
    """A single access counts what the same access counts in a replay."""
    client = own.client
    for number, member in enumerate(("sppt", "ept")):
        home = client.post(
            "/v1/vms", json={"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 16 * MIB}]}
        ).headers["Location"]
        client.put(f"{home}/subpages?gfn=0x10", json={"access": ["0xfffffffe"]})
        client.post(f"{home}/accesses", json={"gpa": "0x10800"})
        before = {kind: value(client, "subpage_exits_total", kind=kind) for kind in EXIT_KINDS}
        counted = client.get(f"{home}/counters").json()["counters"]
        # A reserved bit in the leaf, then an access through it.
        client.put(f"{home}/{member}/1/0x10000", json={"value": "0x2" if number else "0xaaaaaaaaaaaaaaaa"})
        client.post(f"{home}/accesses", json={"gpa": "0x10800"})
        after = client.get(f"{home}/counters").json()["counters"]
        for kind in EXIT_KINDS:
            grown = value(client, "subpage_exits_total", kind=kind) - before[kind]
            assert grown == after[f"exits_{kind}"] - counted[f"exits_{kind}"], kind


def test_requests_and_machines(own: Running) -> None:
    client = own.client
    home = client.post("/v1/vms", json={"spp": True}).headers["Location"]
    for _ in range(3):
        client.get(home)
    client.get("/no/such/path")
    client.get("/another")
    httpx2.request("PROPFIND", f"{own.url}/v1/vms")
    count = "subpage_request_seconds_count"
    assert value(client, count, method="GET", route="/v1/vms/{vm}", status="200") == 3
    assert value(client, count, method="POST", route="/v1/vms", status="201") == 1
    assert value(client, count, route="(none)", status="404") == 2, "paths that do not exist share one series"
    assert value(client, count, method="(other)") == 1
    assert value(client, "subpage_requests_under_way") == 1, "the one that asks"
    assert value(client, "subpage_vms") == 1
    counters = client.get(f"{home}/counters").json()["counters"]
    for name, number in counters.items():
        if name.startswith("frames_"):
            assert value(client, "subpage_frames", kind=name.removeprefix("frames_")) == number
    client.delete(home)
    assert value(client, "subpage_vms") == 0
    until = time.monotonic() + 30
    while not value(client, "subpage_event_loop_lag_seconds_count"):
        assert time.monotonic() < until


def test_lag_is_measured() -> None:
    """A loop that is held up is seen to be late."""

    async def run() -> float:
        metrics = Metrics()
        watching = asyncio.create_task(metrics.watch_lag())
        await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251 - this is the point
        await asyncio.sleep(0.05)
        watching.cancel()
        (sum_of,) = (sample.value for sample in metrics.lag.collect()[0].samples if sample.name.endswith("_sum"))
        return float(sum_of)

    assert asyncio.run(run()) >= 0.15


def test_who_may_read_metrics() -> None:
    now = datetime.now(UTC)
    records = {scope: mint(scope, scope=scope, now=now) for scope in ("write", "admin")}  # type: ignore[arg-type]
    store = MemoryTokens(record for record, _ in records.values())
    for public, allowed in ((False, (401, 403, 200)), (True, (200, 200, 200))):
        with running(Settings(warm_up=False, metrics_public=public), store) as service:
            headers = [{}, *({"Authorization": f"Bearer {token}"} for _, token in records.values())]
            found = tuple(service.client.get("/metrics", headers=given).status_code for given in headers)
            assert found == allowed


def record(**members: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "subpage", "levelname": "WARNING", "msg": "a %s", "args": ("b",), **members})
    made.created = 0.0
    return made


def test_json_lines() -> None:
    token = request_id.set("r-1")
    try:
        line = json.loads(JsonFormatter().format(record(fields={"status": 200, "odd": {1}})))
        assert TextFormatter("%(levelname)s: %(message)s").format(record()) == "WARNING: a b [r-1]"
    finally:
        request_id.reset(token)
    assert line == {
        "time": "1970-01-01T00:00:00.000000+00:00",
        "level": "warning",
        "logger": "subpage",
        "message": "a b",
        "request_id": "r-1",
        "status": 200,
        "odd": "{1}",
    }
    try:
        raise ZeroDivisionError("the cause")
    except ZeroDivisionError:
        line = json.loads(JsonFormatter().format(record(exc_info=sys.exc_info())))
    assert "the cause" in line["exception"] and "request_id" not in line


def test_requests_are_logged_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "subpage.access"):
        with running(Settings(warm_up=False)) as quiet:
            quiet.client.get("/v1/vms")
        assert not caplog.records or all(entry.name != "subpage.access" for entry in caplog.records)
        with running(Settings(warm_up=False, access_log=True)) as service:
            service.client.get("/v1/vms?limit=3")
    (entry,) = [entry for entry in caplog.records if entry.name == "subpage.access"]
    assert entry.getMessage() == "GET /v1/vms 200" and entry.fields["seconds"] > 0  # type: ignore[attr-defined]


def test_levels() -> None:
    verbose = configuration(Settings(log_level="debug"))
    assert verbose["loggers"]["subpage"]["level"] == "DEBUG" and verbose["root"]["level"] == "WARNING"
    assert configuration(Settings(log_level="critical"))["root"]["level"] == "CRITICAL"
    assert configuration(Settings())["loggers"]["subpage.access"]["level"] == "CRITICAL"
    assert configuration(Settings(access_log=True))["loggers"]["subpage.access"]["level"] == "INFO"


def test_telemetry_only_when_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = ("tracing", "metrics", "logs", "operation_spans", "auto_configure")
    for wanted in (False, True):
        config = create_app(Settings(telemetry=wanted))._telemetry
        assert [config[switch] for switch in switches] == [wanted] * 5  # type: ignore[literal-required]
    monkeypatch.setattr("service.server.find_spec", lambda name: None)
    check_telemetry(Settings())
    with pytest.raises(Refused, match=r"subpage\[telemetry\]"):
        check_telemetry(Settings(telemetry=True))


def slow_replay(url: str, port: int) -> tuple[str, socket.socket]:
    """A replay whose body has not come to its end."""
    slots = [{"slot": 0, "gpa": 0, "size": MIB}]
    home: str = httpx2.post(f"{url}/v1/vms", json={"memory_slots": slots}).headers["Location"]
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {home}/traces HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
    connection.sendall((head + "Content-Length: 24\r\n\r\n").encode() + b'{"gpa": 64}\n')
    until = time.monotonic() + 30
    while "subpage_requests_under_way 2.0" not in httpx2.get(f"{url}/metrics").text:
        assert time.monotonic() < until
    return home, connection


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_replay_may_finish_while_the_service_drains() -> None:
    with process(SUBPAGE_DRAIN_SECONDS="1", SUBPAGE_LOG_FORMAT="json", SUBPAGE_LOG_LEVEL="info") as (
        started,
        url,
        port,
    ):
        assert httpx2.get(f"{url}/readyz").status_code == 200
        _, connection = slow_replay(url, port)
        with connection:
            started.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while (ready := httpx2.get(f"{url}/readyz")).status_code == 200:
                assert time.monotonic() < until
            assert ready.status_code == 503 and ready.json()["code"] == "not-ready"
            assert httpx2.get(f"{url}/livez").status_code == 200, "it still serves"
            while connects(port):
                assert time.monotonic() < until
            connection.sendall(b'{"gpa": 64}\n')
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 201 ")
        _, logged = started.communicate(timeout=30)
        assert started.returncode == 0
        assert all(json.loads(line)["level"] for line in logged.splitlines())


def test_a_replay_that_does_not_end_is_cancelled() -> None:
    with process(SUBPAGE_SHUTDOWN_TIMEOUT="0", SUBPAGE_AUDIT_LOG="-") as (started, url, port):
        home, connection = slow_replay(url, port)
        with connection:
            started.send_signal(signal.SIGTERM)
            _, told = started.communicate(timeout=30)
            assert started.returncode == 0
            reply = connection.recv(1 << 16)
            assert reply.startswith(b"HTTP/1.1 503 ") and b'"code": "not-ready"' in reply
        lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        assert [(line["path"], line["outcome"]) for line in lines] == [
            ("/v1/vms", "done"),
            (f"{home}/traces", "failed"),
        ]
        assert "Traceback" not in told


def test_a_second_signal_does_not_wait() -> None:
    with process(SUBPAGE_DRAIN_SECONDS="600") as (started, url, _):
        started.send_signal(signal.SIGTERM)
        until = time.monotonic() + 30
        while httpx2.get(f"{url}/readyz").status_code == 200:
            assert time.monotonic() < until
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=30)
        assert started.returncode == 0
