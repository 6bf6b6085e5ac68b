"""Streams of events and what ends them: drains, revoked tokens, readers that leave; and the command that follows."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import Message
from typer.testing import CliRunner

import subpage
from service.app import create_app
from service.cli.app import app
from service.cli.statuses import Status
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.support.event_reader import SSE, following, refuse
from tests.support.http import new_vm
from tests.support.processes import free_port, process, served
from tests.support.server import Running, running
from tests.support.waiting import PATIENCE, until

runner = CliRunner()


@pytest.fixture(scope="module")
def lively() -> Iterator[Running]:
    with running(Settings(warm_up=False, store="memory", event_heartbeat=0.05)) as service:
        yield service


def streams(service: Running) -> int:
    return int(service.app.state.registry.logs.streams)


def test_a_reader_that_leaves_is_noticed(lively: Running) -> None:
    vm = new_vm(lively.client)
    with following(lively.url + vm + "/events") as stream:
        stream.take(1)
        assert streams(lively) == 1
    until(lambda: streams(lively) == 0)


def test_a_slow_reader_holds_nobody_up_and_is_told_what_it_missed() -> None:
    """It takes nothing for so long that its events are no longer kept."""
    lines = asyncio.run(_read_slowly(Settings(warm_up=False, store="memory", kept_events=20, kept_traces=1)))
    position = 1
    for event in lines:
        # Every id once: as an event, or within a marker.
        first = event["detail"]["first"] if event["kind"] == "dropped" else event["id"]
        assert first == position + 1
        position = event["id"]
    # What was on its way, what was no longer kept, a batch whose trace went, and what came last.
    assert [event["kind"] for event in lines][:3] == ["subpages", "dropped", "subpages"]
    dropped = [event["detail"] for event in lines if event["kind"] == "dropped"]
    assert [detail["reason"] for detail in dropped] == ["not-kept", "trace-not-kept"]
    assert position == 53 == lines[-1]["id"]


async def _read_slowly(settings: Settings) -> list[dict[str, Any]]:
    app = create_app(settings)
    pieces: list[bytes] = []
    taken, opened, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        body = message.get("body", b"")
        pieces.append(body)
        if body:
            opened.set()
            await taken.wait()
        if b'"memory-slot"' in body:
            done.set()

    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}], "spp": True}
        vm = (await client.post("/v1/vms", json=document)).headers["Location"]

        async def shut(gfn: int) -> None:
            ranges = [{"gfn": gfn, "npages": 1, "access": 0}]
            assert (await client.patch(f"{vm}/subpages", json={"ranges": ranges})).status_code == 204

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": f"{vm}/events",
            "query_string": b"follow=true&after=latest",
            "headers": [(b"accept", b"application/x-ndjson"), (b"host", b"localhost")],
        }
        reader = asyncio.create_task(app(scope, receive, send))
        while not pieces:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        await shut(1)
        await opened.wait()
        for gfn in range(40):
            await shut(gfn)
        for _ in range(2):
            assert (await client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0}] * 5})).json()["violations"] == 5
        assert (await client.delete(f"{vm}/memory-slots/0")).status_code == 204
        taken.set()
        await reader
    return [json.loads(line) for line in b"".join(pieces).splitlines()]


def test_streams_end_when_the_service_drains() -> None:
    with process(SUBPAGE_DRAIN_SECONDS="600", SUBPAGE_STORE="memory") as (started, url, _):
        vm = httpx2.post(f"{url}/v1/vms", json={}).headers["Location"]
        with following(url + vm + "/events") as stream:
            stream.take(1)
            started.send_signal(signal.SIGTERM)
            (end,) = stream
        assert end["detail"] == {"reason": "draining"}
        refused = httpx2.get(f"{url}{vm}/events", headers=SSE)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert httpx2.get(f"{url}{vm}/events").status_code == 200, "pages are read to the end"
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=PATIENCE)
        assert started.returncode == 0


def test_a_stream_ends_with_the_token_of_its_reader() -> None:
    now = datetime.now(UTC)
    tokens = MemoryTokens()
    reader, text = mint("reader", scope="read", now=now)
    writer, secret = mint("writer", scope="write", now=now)
    tokens.add(reader)
    tokens.add(writer)
    settings = Settings(warm_up=False, store="memory", event_heartbeat=0.05, token_refresh=0.02)
    with running(settings, tokens) as service:
        bearer = {"Authorization": f"Bearer {secret}"}
        vm = service.client.post("/v1/vms", json={}, headers=bearer).headers["Location"]
        with following(service.url + vm + "/events", {**SSE, "Authorization": f"Bearer {text}"}) as stream:
            stream.take(1)
            tokens.revoke(reader.id, datetime.now(UTC))
            (end,) = stream
        assert end["detail"] == {"reason": "unauthenticated"}
        with following(service.url + vm + "/events", {**SSE, **bearer}) as stream:
            assert [event["id"] for event in stream.take(1)] == [1]


def test_a_stream_without_tokens_ends_when_there_are_some() -> None:
    """And the fixed token of the settings does not come and go."""
    tokens = MemoryTokens()
    settings = Settings(warm_up=False, store="memory", event_heartbeat=0.05, token_refresh=0.02)
    with running(settings, tokens) as service:
        vm = service.client.post("/v1/vms", json={}).headers["Location"]
        with following(service.url + vm + "/events") as stream:
            stream.take(1)
            tokens.add(mint("first", now=datetime.now(UTC))[0])
            (end,) = stream
        assert end["detail"] == {"reason": "unauthenticated"}
    secret = "0123456789" * 4
    with running(settings.model_copy(update={"token": Settings(token=secret).token}), MemoryTokens()) as service:
        bearer = {"Authorization": f"Bearer {secret}"}
        vm = service.client.post("/v1/vms", json={}, headers=bearer).headers["Location"]
        with following(service.url + vm + "/events", {**SSE, **bearer}) as stream:
            while stream.last is None or stream.response.num_bytes_downloaded < 200:
                next(stream._lines)
                stream.last = 0


# The command


def run(*arguments: str, status: int = 0) -> str:
    result = runner.invoke(app, ["events", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_the_command_prints_the_log(lively: Running) -> None:
    vm = new_vm(lively.client, name="a guest")
    trace = refuse(lively.client, vm, 2, max_exit_records=1)
    name = vm.rpartition("/")[2]
    lines = run(name, "--url", lively.url).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert "lifecycle" in lines[0] and 'name="a guest"' in lines[0] and "change=created" in lines[0]
    assert "violation" in lines[2] and "gpa=0x1000" in lines[2] and lines[2].endswith(f"trace={trace}")
    assert lines[3].endswith("dropped      1 events, 4 to 4, cannot be shown: not-listed")
    log = [json.loads(line) for line in run(name, "--url", lively.url, "--json", "--after", "1").splitlines()]
    assert log[:-1] == lively.client.get(f"{vm}/events", params={"after": 1}).json()["events"][:-1]
    assert [event["kind"] for event in log] == ["subpages", "violation", "dropped"]
    assert run(name, "--url", lively.url, "--kinds", "host-memory") == ""
    assert "422" in run(name, "--url", lively.url, "--kinds", "violations", status=1)
    assert "404" in run("vm_0", "--url", lively.url, "--follow", status=Status.NOT_FOUND)
    assert "127.0.0.1:9" in run(name, "--url", "http://127.0.0.1:9", "--follow", status=Status.NO_SERVICE)


def test_the_command_can_be_stopped(lively: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    name = new_vm(lively.client).rpartition("/")[2]
    monkeypatch.setattr(subpage.Vm, "events", stop)
    assert run(name, "--url", lively.url, "--follow") == ""
    assert run(name, "--url", lively.url, status=Status.INTERRUPTED) == "subpage events: interrupted\n"


def test_following_goes_on_when_the_service_was_killed(tmp_path: Path) -> None:
    port = free_port()
    store, url = f"sqlite:///{tmp_path}/subpage.db", f"http://127.0.0.1:{port}"

    def change(gfn: int) -> None:
        ranges = [{"gfn": gfn, "npages": 1, "access": 0}]
        assert httpx2.patch(f"{url}{vm}/subpages", json={"ranges": ranges}).status_code == 204

    with served(port, store):
        document = {"memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 20}], "spp": True}
        vm = httpx2.post(f"{url}/v1/vms", json=document).headers["Location"]
        command = [sys.executable, "-m", "service.cli", "events", vm.rpartition("/")[2], "--url", url]
        command += ["--follow", "--json", "--after", "latest"]
        told = tmp_path / "told"
        with told.open("w") as log:
            follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert follower.stdout is not None
        until(lambda: "subpage_event_streams 1.0" in httpx2.get(f"{url}/metrics").text)
        change(1)
        assert json.loads(follower.stdout.readline())["id"] == 2
    # Killed; what follows happens while nobody listens.
    until(lambda: "trying again" in told.read_text())
    with served(port, store):
        change(2)
        change(3)
        assert [json.loads(follower.stdout.readline())["id"] for _ in range(2)] == [3, 4]
        assert httpx2.delete(f"{url}{vm}").status_code == 204
        assert follower.stdout.readline() == ""
        assert follower.wait(PATIENCE) == 0
        follower.stdout.close()
