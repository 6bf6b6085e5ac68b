"""OpenTelemetry: a service that is told to sends its spans and metrics where the standard variables say."""

from __future__ import annotations

import contextlib
import gzip
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import httpx2
import pytest


def _installed() -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    return False


pytestmark = pytest.mark.skipif(not _installed(), reason="needs the extra: pip install subpage[telemetry]")

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def collector() -> Iterator[tuple[str, queue.Queue[tuple[str, bytes]]]]:
    """An OTLP receiver: its endpoint, and (path, protobuf) of what arrives."""
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            coded = self.headers.get("Content-Encoding") == "gzip"
            arrived.put((self.path, gzip.decompress(content) if coded else content))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", arrived
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def serving(**environment: str) -> Iterator[str]:
    """``subpage serve`` as people run it: providers of OpenTelemetry belong to the process. Stops it in order."""
    environment = {"SUBPAGE_WARM_UP": "false", "SUBPAGE_STORE": "memory", **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve", "--port", "0"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip().removeprefix("subpage is listening on ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def attributes(item: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in item.attributes}


def received(arrived: queue.Queue[tuple[str, bytes]], path: str, message: Any) -> list[Any]:
    """Everything that came to ``path``, decoded."""
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            sent_to, content = arrived.get_nowait()
            if sent_to == path:
                found.append(message.FromString(content))
    return found


def test_spans_arrive(collector: tuple[str, queue.Queue[tuple[str, bytes]]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, arrived = collector
    told = {"SUBPAGE_TELEMETRY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": "subpage-test"}
    with serving(**told) as url, httpx2.Client(base_url=url, timeout=60.0) as client:
        home = client.post("/v1/vms", json={"name": "traced"}).headers["Location"]
        assert client.get(home, headers={"traceparent": f"00-{PARENT}-00f067aa0ba902b7-01"}).status_code == 200
        assert client.get("/v1/vms/vm_none").status_code == 404
    # What was not yet sent is sent when the service stops.
    requests = received(arrived, "/v1/traces", ExportTraceServiceRequest)
    resources = [resource for request in requests for resource in request.resource_spans]
    assert {attributes(resource.resource)["service.name"] for resource in resources} == {"subpage-test"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    served = [(span, attributes(span)) for span in spans if "http.route" in attributes(span)]
    seen = {
        (named["http.request.method"], named["http.route"], named["http.response.status_code"]) for _, named in served
    }
    assert {("POST", "/v1/vms", 201), ("GET", "/v1/vms/{vm}", 200), ("GET", "/v1/vms/{vm}", 404)} <= seen
    # The caller's trace goes on in the service.
    (ours,) = [named for span, named in served if span.trace_id.hex() == PARENT and not named.get("error.type")]
    assert ours["http.route"] == "/v1/vms/{vm}"


def test_metrics_arrive(collector: tuple[str, queue.Queue[tuple[str, bytes]]]) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    endpoint, arrived = collector
    with serving(SUBPAGE_TELEMETRY="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as url:
        assert httpx2.get(f"{url}/v1/vms").status_code == 200
    requests = received(arrived, "/v1/metrics", ExportMetricsServiceRequest)
    names = {
        metric.name
        for request in requests
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert "http.server.request.duration" in names


def test_nothing_is_sent_unless_asked_for(collector: tuple[str, queue.Queue[tuple[str, bytes]]]) -> None:
    """The variables alone, which other programs of the machine may need, switch nothing on."""
    endpoint, arrived = collector
    with serving(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as url:
        assert httpx2.get(f"{url}/v1/vms").status_code == 200
    assert arrived.empty()


def test_a_collector_that_is_away_changes_nothing() -> None:
    with serving(
        SUBPAGE_TELEMETRY="true", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_EXPORTER_OTLP_TIMEOUT="1"
    ) as url:
        assert [httpx2.get(f"{url}/v1/vms").status_code for _ in range(5)] == [200] * 5
