"""Live introspection over a real server: what tools are asked, what their answers do, and what ends it."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from service.http.sockets import MESSAGE_BYTES
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support.bodies import arrow, table
from tests.support.server import Running, running
from tests.support.tools import Background, ToolClient, answering, tool, trace, url_of

OPEN, SHUT, HELD = 0x9000, 0x5200, 0x6010
ROWS = [OPEN, SHUT, OPEN, SHUT + 8, HELD, 0x5FFC, OPEN]
COUNTED = ("records", "writes", "violations", "page_granular_violations", "by_object", "mmio", "exits", "stopped_at")


def shut(client: ContractClient, vm: str, word: int = 0xF) -> None:
    reply = client.put(f"{vm}/subpages", params={"gfn": 5, "npages": 1}, json={"access": [word]})
    assert reply.status_code == 204, reply.text


def protect(client: ContractClient, vm: str, name: str = "secret", gpa: int = HELD) -> None:
    objects = [{"name": name, "gpa": gpa, "size": 16}]
    assert client.post(f"{vm}/protections", json={"name": name, "objects": objects}).status_code == 201


@pytest.fixture
def guest(make_vm: Callable[..., str], client: ContractClient) -> str:
    """A machine with a page that is shut but for four sub-pages, and an object."""
    vm = make_vm()
    shut(client, vm)
    protect(client, vm)
    return vm


def post(client: ContractClient, vm: str, rows: list[int], on_violation: str = "ask", **query: Any) -> httpx2.Response:
    return client.post(f"{vm}/traces", params={"on_violation": on_violation, **query}, json=trace(rows))


def counters(client: ContractClient, vm: str) -> dict[str, int]:
    found: dict[str, int] = client.get(f"{vm}/counters").json()["counters"]
    return found


def counted(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in COUNTED}


@pytest.fixture
def ask(client: ContractClient, guest: str) -> Callable[..., Background]:
    return lambda rows=ROWS, **query: Background(lambda: post(client, guest, rows, **query))


# ---- answers


@pytest.mark.parametrize("action", ["skip", "allow", "grant", "stop"])
def test_always_the_same_answer(
    action: str, service: Running, client: ContractClient, guest: str, make_vm: Callable[..., str]
) -> None:
    plain = make_vm()
    shut(client, plain)
    protect(client, plain)
    known = post(client, plain, ROWS, action, include="all").json()
    with answering(service, guest, action) as run:
        reply = post(client, guest, ROWS, include="all")
    found = reply.json()
    assert reply.status_code == 201 and found["on_violation"] == "ask"
    assert counted(found) == counted(known) and known["violations"] >= 1
    assert found["exit_records"] == known["exit_records"]
    assert client.get(reply.headers["Location"]).json() == found
    assert counters(client, guest) == counters(client, plain)
    asked = [item["exit"] for item in run.questions]
    assert asked == [item for item in known["exit_records"] if item["resolution"] == "violation"]
    assert {item["trace"] for item in run.questions} == {found["id"]}
    assert [item["action"] for item in run.others if item["type"] == "resolved"][: len(asked)] == [action] * len(
        [item for item in run.others if item["type"] == "resolved"]
    )


def test_the_machine_may_be_changed_while_it_waits(
    service: Running, client: ContractClient, guest: str, ask: Callable[..., Background]
) -> None:
    with tool(service, guest) as watcher:
        going = ask([OPEN, SHUT, SHUT])
        question = watcher.receive("violation")
        assert (question["exit"]["index"], question["exit"]["gpa"], question["attempt"]) == (1, hex(SHUT), 1)
        # What came before is committed, and readers see it.
        assert counters(client, guest)["records"] == 1
        watcher.answer(question, "retry")
        again = watcher.receive("resolved") and watcher.receive("violation")
        assert again["attempt"] == 2 and again["id"] != question["id"]
        shut(client, guest, 0xFFFF_FFFF)
        watcher.answer(again, "retry")
        assert watcher.receive("resolved")["by"] is not None
        result = going.result().json()
    assert (result["records"], result["violations"]) == (3, 2)


def test_protections_may_go_while_it_waits(
    service: Running, client: ContractClient, guest: str, ask: Callable[..., Background]
) -> None:
    with tool(service, guest) as watcher:
        going = ask([HELD, HELD, SHUT])
        question = watcher.receive("violation")
        assert question["exit"]["objects"] == ["secret"]
        protect(client, guest, "other", SHUT)
        assert client.delete(f"{guest}/protections/secret").status_code == 204
        watcher.answer(question, "allow")
        watcher.receive("resolved")
        last = watcher.receive("violation")
        assert last["exit"]["objects"] == ["other"] and last["exit"]["index"] == 2
        watcher.answer(last, "skip")
        result = going.result().json()
    assert [item["objects"] for item in result["exit_records"]] == [["secret"], ["other"]]
    hits = {name: (hit["violations"], hit["first_index"]) for name, hit in result["by_object"].items()}
    assert hits == {"secret": (1, 0), "other": (1, 2)}


@pytest.mark.parametrize(("action", "landed"), [("allow", True), ("grant", True), ("skip", False), ("stop", False)])
def test_one_access(action: str, landed: bool, service: Running, client: ContractClient, guest: str) -> None:
    body = {"gpa": hex(SHUT), "data": "0102030405060708", "on_violation": "ask"}
    with answering(service, guest, action) as run:
        outcome = client.post(f"{guest}/accesses", json=body).json()
    assert outcome["landed"] is landed and outcome["resolution"] == "violation"
    assert [item["trace"] for item in run.questions] == [None]
    stored = client.get(f"{guest}/memory", params={"gpa": SHUT, "size": 8}).content
    assert stored == (bytes(range(1, 9)) if landed else bytes(8))
    assert counters(client, guest)["violations"] == 1


def test_one_access_that_nobody_refuses(client: ContractClient, guest: str) -> None:
    assert client.post(f"{guest}/accesses", json={"gpa": OPEN, "on_violation": "ask"}).json()["allowed"]


# ---- who is asked


def test_nobody_is_there(client: ContractClient, guest: str, make_vm: Callable[..., str]) -> None:
    plain = make_vm()
    shut(client, plain)
    protect(client, plain)
    assert counted(post(client, guest, ROWS).json()) == counted(post(client, plain, ROWS, "skip").json())


def test_priority_and_pass(service: Running, guest: str, ask: Callable[..., Background]) -> None:
    with tool(service, guest, priority=1) as second, tool(service, guest, priority=2) as first:
        going = ask([SHUT, SHUT])
        question = first.receive("violation")
        first.answer(question, "pass")
        same = second.receive("violation")
        assert same["id"] == question["id"]
        first.answer(question, "allow")
        assert first.receive("error")["problem"]["code"] == "conflict"
        second.answer(same, "grant")
        for watcher in (first, second):
            told = watcher.receive("resolved")
            assert (told["id"], told["action"], told["reason"]) == (question["id"], "grant", "answer")
        assert going.result().json()["violations"] == 1


def test_every_tool_passes(service: Running, guest: str, ask: Callable[..., Background]) -> None:
    """The default is that of the most important tool that has one."""
    with (
        tool(service, guest, priority=3) as first,
        tool(service, guest, priority=2, default_action="stop") as second,
        tool(service, guest, priority=1, default_action="allow") as third,
    ):
        going = ask([SHUT, OPEN])
        for watcher in (first, second, third):
            watcher.answer(watcher.receive("violation"), "pass")
        told = first.receive("resolved")
        assert (told["action"], told["reason"], told["by"]) == ("stop", "default", None)
        assert going.result().json()["stopped_at"] == 0


def test_no_answer_in_time(
    service: Running, client: ContractClient, guest: str, ask: Callable[..., Background]
) -> None:
    before = metrics(client)
    with tool(service, guest, timeout=0.05, default_action="grant") as watcher:
        going = ask([SHUT, SHUT])
        question = watcher.receive("violation")
        told = watcher.receive("resolved")
        assert (told["action"], told["reason"]) == ("grant", "default")
        assert datetime.fromisoformat(question["deadline"]).tzinfo is not None
        assert going.result().json()["violations"] == 1
        watcher.answer(question, "allow")
        assert watcher.receive("error")["problem"]["field"] == "id"
        after = metrics(client)
        assert after["subpage_introspection_tools"] == 1
    assert after["subpage_introspection_timeouts_total"] - before.get("subpage_introspection_timeouts_total", 0) == 1
    key = 'subpage_introspection_answers_total{action="grant",reason="default"}'
    assert after[key] - before.get(key, 0) == 1
    assert after["subpage_introspection_questions_total"] - before["subpage_introspection_questions_total"] == 1


def metrics(client: ContractClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@pytest.mark.parametrize("how", ["close", "break"])
def test_detaching_releases_the_guest(how: str, service: Running, guest: str, ask: Callable[..., Background]) -> None:
    with tool(service, guest, priority=1) as second:
        with tool(service, guest, priority=2, default_action="allow") as first:
            going = ask([SHUT, OPEN])
            question = first.receive("violation")
            if how == "break":
                first.socket.socket.shutdown(2)
            else:
                first.socket.close()
        same = second.receive("violation")
        assert same["id"] == question["id"]
        second.socket.close()
        # Nobody is left: the default is that of the service.
        result = going.result().json()
        assert (result["violations"], result["records"]) == (1, 2)


def test_tools_choose_what_they_are_asked(
    service: Running, client: ContractClient, guest: str, ask: Callable[..., Background]
) -> None:
    filters: list[dict[str, Any]] = [
        {"objects": ["secret"]},
        {"ranges": [{"gfn": "0x6", "npages": 1}, {"gfn": 7}]},
        {"accesses": ["write"], "objects": ["secret", "nothing"], "kinds": ["violation"]},
    ]
    for wanted in filters:
        with answering(service, guest, "skip", **wanted) as run:
            assert ask([SHUT, HELD]).result().json()["violations"] == 2
        assert [item["exit"]["gpa"] for item in run.questions] == [hex(HELD)], wanted
    for unwanted in ({"accesses": ["execute"]}, {"kinds": ["internal-error"]}, {"objects": []}, {"ranges": []}):
        with answering(service, guest, "stop", **unwanted) as run:
            assert ask([SHUT, HELD]).result().json()["stopped_at"] is None
        assert run.questions == []


def test_several_accesses_wait_at_a_time(service: Running, client: ContractClient, guest: str) -> None:
    calls = []
    with tool(service, guest) as watcher:
        for gpa in (SHUT, HELD):
            body = {"gpa": hex(gpa), "on_violation": "ask"}
            calls.append(Background(lambda body=body: client.post(f"{guest}/accesses", json=body)))  # type: ignore[misc]
        questions = [watcher.receive("violation") for _ in calls]
        assert {item["exit"]["gpa"] for item in questions} == {hex(SHUT), hex(HELD)}
        for question in reversed(questions):
            watcher.answer(question, "allow")
        assert all(call.result().json()["landed"] for call in calls)


# ---- bodies that arrive while it waits


def packed(rows: list[int]) -> bytes:
    return b"".join(gpa.to_bytes(8, "little") for gpa in rows)


def test_a_body_goes_on_after_an_answer(service: Running, client: ContractClient, guest: str) -> None:
    """Batches of Arrow are replayed as they come: the last ones are sent when the first was answered."""
    answered = threading.Event()
    whole = arrow(table(gpa=[OPEN, SHUT, SHUT, OPEN]), batch=2)
    half = whole.content.index(struct.pack("<Q", SHUT)) + 8 + len(whole.content) // 8

    def body() -> Iterator[bytes]:
        yield whole.content[:half]
        assert answered.wait(30)
        yield whole.content[half:]

    with tool(service, guest) as watcher:
        url, query = f"{guest}/traces", {"on_violation": "ask"}
        going = Background(lambda: client.post(url, params=query, headers=whole.headers, content=body()))
        for _ in range(2):
            watcher.answer(watcher.receive("violation"), "allow")
            watcher.receive("resolved")
            answered.set()
        assert going.result().json()["records"] == 4


@pytest.mark.parametrize("at", ["the first stretch", "later"])
def test_a_bad_record(at: str, service: Running, client: ContractClient, guest: str) -> None:
    lines = [{"gpa": OPEN}, {"gpa": SHUT}, {"gpa": OPEN}, {"gpa": OPEN, "size": 0}]
    if at != "later":
        lines = lines[2:]
    before = client.get(guest).json()["revision"]
    with answering(service, guest, "grant"):
        reply = client.post(
            f"{guest}/traces",
            params={"on_violation": "ask"},
            headers={"Content-Type": "application/x-ndjson"},
            content="".join(json.dumps(line) + "\n" for line in lines),
        )
    problem = reply.json()
    assert reply.status_code == 422 and problem["code"] == "invalid-trace"
    assert problem.get("resume_at") == (1 if at == "later" else None)
    # The grant belonged to the stretch that the bad record ended.
    now = counters(client, guest)
    assert (now["records"], now["grants"]) == ((1, 0) if at == "later" else (0, 0))
    assert client.get(guest).json()["revision"] == before + (at == "later")


def test_a_client_that_leaves(service: Running, client: ContractClient, guest: str) -> None:
    with tool(service, guest) as watcher:
        with pytest.raises(httpx2.ReadTimeout), httpx2.Client(base_url=service.url, timeout=1.0) as hasty:
            hasty.post(f"{guest}/traces", params={"on_violation": "ask"}, json=trace([OPEN, SHUT, OPEN]))
        question = watcher.receive("violation")
        told = watcher.receive("resolved")
        assert (told["id"], told["action"], told["reason"]) == (question["id"], None, "ended")
    assert counters(client, guest)["records"] == 1
    assert client.get(f"{guest}/traces").json()["traces"] == []
    with tool(service, guest) as watcher:
        with pytest.raises(httpx2.ReadTimeout), httpx2.Client(base_url=service.url, timeout=1.0) as hasty:
            hasty.post(f"{guest}/accesses", json={"gpa": SHUT, "on_violation": "ask"})
        watcher.receive("violation")
        assert watcher.receive("resolved")["reason"] == "ended"


def test_the_machine_is_deleted(service: Running, client: ContractClient, make_vm: Callable[..., str]) -> None:
    vm = make_vm()
    shut(client, vm)
    with tool(service, vm) as watcher:
        going = Background(lambda: post(client, vm, [OPEN, SHUT]))
        watcher.receive("violation")
        assert client.delete(vm).status_code == 204
        reply = going.result()
        assert reply.status_code == 404 and reply.json()["field"] == "vm" and reply.json()["resume_at"] == 1
        assert watcher.closed()[0] == 4404


def test_the_machine_is_busy_when_the_answer_comes(service: Running, make_vm: Callable[..., str]) -> None:
    with running(Settings(warm_up=False, busy_timeout=0.05)) as other:
        client = other.client
        slot = {"slot": 0, "gpa": 0, "size": 1 << 24}
        vm = client.post("/v1/vms", json={"spp": True, "memory_slots": [slot]}).headers["Location"]
        shut(client, vm)
        held, let_go = threading.Event(), threading.Event()

        def body() -> Iterator[bytes]:
            yield packed([OPEN])
            held.set()
            assert let_go.wait(30)

        with tool(other, vm) as watcher:
            going = Background(lambda: post(client, vm, [OPEN, SHUT]))
            question = watcher.receive("violation")
            holder = Background(
                lambda: client.post(
                    f"{vm}/traces",
                    params={"record": "gpa8"},
                    headers={"Content-Type": "application/octet-stream"},
                    content=body(),
                )
            )
            assert held.wait(30)
            # A replay holds its machine when a part of its body is there, or less for some time.
            while client.put(f"{vm}/spp", json={"active": True}).status_code != 409:
                time.sleep(0.01)
            watcher.answer(question, "allow")
            reply = going.result()
            let_go.set()
            assert holder.result().status_code == 201
        assert reply.status_code == 409 and reply.json()["code"] == "vm-busy" and reply.json()["resume_at"] == 1


def test_too_many_wait() -> None:
    with running(Settings(warm_up=False, max_questions=1, max_tools=1)) as other:
        client = other.client
        slot = {"slot": 0, "gpa": 0, "size": 1 << 24}
        vm = client.post("/v1/vms", json={"spp": True, "memory_slots": [slot]}).headers["Location"]
        shut(client, vm)
        with tool(other, vm) as watcher:
            going = Background(lambda: post(client, vm, [SHUT]))
            question = watcher.receive("violation")
            reply = client.post(f"{vm}/accesses", json={"gpa": SHUT, "on_violation": "ask"})
            assert reply.status_code == 429 and reply.json()["field"] == "max_questions"
            assert reply.json()["resume_at"] == 0
            with pytest.raises(InvalidStatus) as refused, connect(url_of(other, vm)):
                pass
            assert refused.value.response.status_code == 429
            assert json.loads(refused.value.response.body)["field"] == "max_tools"
            watcher.answer(question, "skip")
            assert going.result().status_code == 201


# ---- the protocol


def refusal(message: str, client: ToolClient) -> dict[str, Any]:
    client.socket.send(message)
    problem: dict[str, Any] = client.receive("error")["problem"]
    return problem


def test_messages_that_are_refused(service: Running, guest: str) -> None:
    with tool(service, guest, attach=False) as watcher:
        assert watcher.socket.subprotocol == "subpage.introspection.v1"
        assert refusal("{", watcher)["code"] == "malformed-body"
        assert refusal("[]", watcher)["code"] == "invalid-value"
        assert refusal('{"type": "dance"}', watcher)["code"] == "invalid-value"
        assert refusal('{"type": "attach", "priority": 1001}', watcher)["field"] == "attach.priority"
        assert refusal('{"type": "attach", "timeout": 0}', watcher)["field"] == "attach.timeout"
        assert refusal('{"type": "attach", "default_action": "retry"}', watcher)["code"] == "invalid-value"
        assert refusal('{"type": "attach", "colour": 1}', watcher)["code"] == "invalid-value"
        assert refusal('{"type": "answer", "id": "q", "action": "allow"}', watcher)["field"] == "type"
        watcher.send(type="ping", data="there?")
        assert watcher.receive("pong")["data"] == "there?"
        told = watcher.attach(priority=5, timeout=2)
        assert (told["priority"], told["timeout"], told["default_action"], told["tools"]) == (5, 2.0, "skip", 1)
        assert refusal('{"type": "attach"}', watcher)["field"] == "type"
        assert refusal('{"type": "answer", "id": "q", "action": "allow"}', watcher)["code"] == "not-found"


@pytest.mark.parametrize(("message", "code"), [(b"\0", 1003), ("x" * (MESSAGE_BYTES + 1), 1009)])
def test_messages_that_end_it(message: bytes | str, code: int, service: Running, guest: str) -> None:
    with tool(service, guest) as watcher:
        watcher.socket.send(message)
        assert watcher.closed()[0] == code


def test_whoever_does_not_attach_is_sent_away(service: Running, guest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.events.introspection._ATTACH_SECONDS", 0.05)
    with tool(service, guest, attach=False) as watcher:
        assert watcher.closed() == (1008, "attach comes first, within 10 seconds")


def test_whoever_does_not_read_is_sent_away(service: Running, guest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.events.introspection._OUTBOX", 0)
    with tool(service, guest, attach=False) as watcher:
        watcher.send(type="ping")
        assert watcher.closed() == (1008, "messages are not read")


def opening(service: Running, vm: str, headers: dict[str, str] | None = None, **options: Any) -> int:
    """The status of an opening handshake, 101 if it succeeds; a refusal is a problem."""
    try:
        with connect(url_of(service, vm), additional_headers=headers, **options):
            return 101
    except InvalidStatus as refused:
        response = refused.response
        assert response.headers["Content-Type"] == "application/problem+json"
        assert json.loads(response.body)["status"] == response.status_code
        return response.status_code


def test_openings_that_are_refused(service: Running, guest: str) -> None:
    assert opening(service, "/v1/vms/vm_0") == 404
    assert opening(service, guest, {"Origin": "https://elsewhere.example"}) == 403
    assert opening(service, guest, {"Origin": "null"}) == 403
    assert opening(service, guest, {"Origin": f"http://127.0.0.1:{service.port}"}) == 101
    with pytest.raises(InvalidStatus) as refused, connect(url_of(service, guest) + "?priority=1"):
        pass
    assert refused.value.response.status_code == 422


@pytest.fixture
def guarded() -> Iterator[tuple[Running, dict[str, str], MemoryTokens]]:
    store, tokens = MemoryTokens(), {}
    for name, tenant, scope in (("red", "red", "write"), ("reader", "red", "read"), ("blue", "blue", "admin")):
        record, tokens[name] = mint(name, tenant=tenant, scope=scope, now=datetime.now(UTC))
        store.add(record)
    settings = Settings(warm_up=False, token_refresh=0.02, cors_origins=("https://tool.example",))
    with running(settings, store) as service:
        yield service, tokens, store


def test_who_may(guarded: tuple[Running, dict[str, str], MemoryTokens]) -> None:
    service, tokens, store = guarded
    bearer = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
    document = {"spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": 1 << 24}]}
    # Not the checking client: with CORS on, replies vary with the origin, which the contract leaves out.
    vm = httpx2.post(f"{service.url}/v1/vms", json=document, headers=bearer["red"]).headers["Location"]
    assert opening(service, vm) == 401
    assert opening(service, vm, bearer["reader"]) == 403
    assert opening(service, vm, bearer["blue"]) == 404
    assert opening(service, vm, bearer["red"]) == 101
    for offered, status in ((tokens["red"], 101), (tokens["reader"], 403), ("sp_0_0", 401)):
        protocols = ["subpage.introspection.v1", f"subpage.bearer.{offered}"]
        assert opening(service, vm, {"Origin": "https://tool.example"}, subprotocols=protocols) == status
    # A token that is revoked ends what it began.
    with connect(url_of(service, vm), additional_headers=bearer["red"]) as socket:
        watcher = ToolClient(socket)
        watcher.attach()
        store.revoke(tokens["red"].split("_")[1], datetime.now(UTC))
        while httpx2.get(service.url + vm, headers=bearer["red"]).status_code != 401:
            time.sleep(0.01)
        assert watcher.closed() == (1008, "the token is not valid any more")
