"""What goes wrong is told in a sentence: no service, another one, TLS, versions, tokens, replies without end."""

from __future__ import annotations

import socket
import ssl
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest

import subpage
from subpage import Client
from subpage.core import Core
from subpage.transports import BLOCKING, Transport
from subpage.wire import LINE_BYTES
from tests.client.stub import VERSION, Answer, problem, stub


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_service() -> None:
    with Client(f"http://127.0.0.1:{closed_port()}") as client, pytest.raises(subpage.Unreachable) as told:
        client.version()
    assert "start one with `subpage serve`" in str(told.value)


def test_no_such_host() -> None:
    with Client("http://nowhere.invalid:8000") as client, pytest.raises(subpage.Unreachable, match=r"no host|no serv"):
        client.version()


@pytest.mark.parametrize("url", ["", "ftp://here", "http://", "http://here:8000?x=1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(subpage.BadInput, match="must be a URL such as"):
        Client(url)


@pytest.mark.parametrize("token", ["", "two words", "naïve", "line\n"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    with pytest.raises(subpage.BadInput, match="printable ASCII"):
        Client(token=token)


@pytest.mark.parametrize(
    "version", [Answer(404, {}), Answer(document={"name": "other"}), Answer(body=b"<html>"), Answer(document=[1])]
)
def test_something_else_answers(version: Answer) -> None:
    with (
        stub(Answer(document={}), version=version) as other,
        Client(other.url) as client,
        pytest.raises(subpage.NotSubpage, match="is not Subpage"),
    ):
        client.capabilities()


def test_tls_that_does_not_speak_tls() -> None:
    with stub(Answer(document={})) as plain:
        url = plain.url.replace("http:", "https:")
        with Client(url) as client, pytest.raises(subpage.Untrusted, match="perhaps it is http"):
            client.version()


def test_authorities_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("none")
    with pytest.raises(subpage.BadInput, match="no certificates"):
        Client("https://127.0.0.1", ca=tmp_path / "empty.pem")
    with pytest.raises(subpage.BadInput, match="No such file"):
        Client("https://127.0.0.1", ca=tmp_path / "missing.pem")


def test_a_certificate_that_nobody_vouches_for() -> None:
    error = ssl.SSLCertVerificationError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    from subpage.wire import httpx2, told

    found = told("https://here", httpx2.ConnectError(str(error)))
    assert isinstance(found, subpage.Untrusted) and "is not trusted" in str(found)


def test_another_version_is_told_once_with_what_differs() -> None:
    contract = {
        "paths": {"/v1/moons": {"get": {"operationId": "listMoons"}}, "/v1/vms": {"get": {"operationId": "listVms"}}}
    }
    younger = Answer(document={**VERSION, "version": "9.0.0"})
    with stub(Answer(document=contract), version=younger) as server, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            with Client(server.url) as client:
                client.call("listMoons")
    (warning,) = told
    assert warning.category is subpage.VersionMismatch
    text = str(warning.message)
    assert "is Subpage 9.0.0" in text and "only the service has: listMoons; only the client knows: ackn" in text


def test_an_operation_of_nobody(client: Client) -> None:
    with pytest.raises(subpage.BadInput, match=r"no operation of .*; perhaps getVm"):
        client.call("getVmm")


def test_tokens() -> None:
    from service.security.tokens import MemoryTokens, mint
    from service.settings import Settings
    from tests.support.server import running

    tokens, secrets = MemoryTokens(), {}
    for scope in ("read", "write"):
        record, secrets[scope] = mint(scope, tenant="red", scope=scope, now=datetime.now(UTC), expires=None)
        tokens.add(record)
    with running(Settings(warm_up=False), tokens=tokens) as guarded:
        with Client(guarded.url) as nobody, pytest.raises(subpage.Unauthenticated, match="takes a token") as told:
            list(nobody.vms())
        assert told.value.status == 401
        with Client(guarded.url, secrets["write"]) as writer, Client(guarded.url, secrets["read"]) as reader:
            machine = writer.create_vm(memory="1MiB")
            with pytest.raises(subpage.Forbidden):
                reader.vm(machine.id).set_subpages(0, 0)
            with pytest.raises(subpage.Forbidden):
                reader.vm(machine.id).attach(lambda question: "skip")
            machine.set_subpages(0, 0)
            with machine.attach(lambda question: "allow"):
                assert machine.access(0, on_violation="ask")["landed"]
            assert [event["kind"] for event in reader.vm(machine.id).events()][-1] == "violation"


def test_a_problem_carries_everything(vm: subpage.Vm) -> None:
    with pytest.raises(subpage.NotFound) as missing:
        vm.trace("tr_0000000000000000")
    assert (missing.value.status, missing.value.code) == (404, "not-found")
    with pytest.raises(subpage.Problem) as refused:
        vm.protect([{"name": "a", "gpa": 0}], name="p")
    assert (
        refused.value.field == "objects[0].size" and refused.value.rule and refused.value.detail in str(refused.value)
    )
    with pytest.raises(subpage.Problem, match="at record 1") as bad:
        vm.replay([{"gpa": 0}, {"gpa": 1 << 60}])
    assert bad.value.index == 1


def test_a_passing_refusal_is_tried_again() -> None:
    made = {"id": "vm_1", "name": ""}
    with stub(problem(409, "vm-busy", 0), problem(503, "not-ready"), Answer(201, made)) as server:
        with Client(server.url) as client:
            assert client.create_vm().id == "vm_1"
        keys = {headers["Idempotency-Key"] for _, _, headers, _ in server.requests}
        assert len(server.requests) == 3 and len(keys) == 1


def test_a_lost_answer_is_asked_for_again() -> None:
    with stub(Answer(201, {"id": "vm_1", "name": ""}, cut=3), Answer(201, {"id": "vm_1", "name": ""})) as server:
        with Client(server.url) as client:
            client.create_vm()
        first, second = server.requests
        assert first[2]["Idempotency-Key"] == second[2]["Idempotency-Key"] and first[3] == second[3]


def test_a_delete_whose_answer_was_lost_is_done() -> None:
    made, lost = Answer(201, {"id": "vm_1", "name": ""}), Answer(200, {}, cut=1)
    with stub(made, lost, problem(404, "not-found")) as server, Client(server.url) as client:
        client.create_vm().delete()


def test_a_conditional_change_whose_answer_was_lost_is_not_refused_by_its_own_effect() -> None:
    made, lost = Answer(201, {"id": "vm_1", "name": ""}), Answer(200, {}, cut=1)
    with stub(made, lost, problem(412, "precondition-failed")) as server, Client(server.url) as client:
        vm = client.create_vm()
        with pytest.raises(subpage.Unreachable):
            vm.set_subpages(1, 0, etag='"1"')


def test_what_can_be_read_once_is_sent_once() -> None:
    made = Answer(201, {"id": "vm_1", "name": ""})
    with stub(made, problem(409, "vm-busy", 0), made) as server, Client(server.url) as client:
        vm = client.create_vm()
        with pytest.raises(subpage.Problem):
            vm.call("createTrace", content=iter([b"once"]))
        assert len(server.requests) == 2


def test_a_published_replay_has_no_key() -> None:
    made = Answer(201, {"id": "vm_1", "name": ""})
    with stub(made, Answer(201, {"id": "tr_1", "vm": "vm_1"})) as server, Client(server.url) as client:
        client.create_vm().replay(b"ARROW", media="application/vnd.apache.arrow.stream", publish_every="200ms")
        assert "Idempotency-Key" not in server.requests[1][2]


def test_dots_are_no_name(vm: subpage.Vm) -> None:
    with pytest.raises(subpage.BadInput, match="dots"):
        vm.unprotect("..")


@pytest.mark.parametrize(
    "refused", [problem(429, "limit-exceeded", 5), problem(422, "invalid-value"), problem(500, "x")]
)
def test_others_are_not(refused: Answer) -> None:
    with stub(refused) as server, Client(server.url) as client, pytest.raises(subpage.Problem):
        client.create_vm()
    assert len(server.requests) == 1


def test_without_patience_nothing_is_tried_again() -> None:
    with stub(problem(409, "vm-busy", 1)) as server:
        with Client(server.url, patience=0) as client, pytest.raises(subpage.Problem):
            client.create_vm()
        assert len(server.requests) == 1 and "Idempotency-Key" not in server.requests[0][2]


def test_a_reply_is_bounded() -> None:
    with (
        stub(Answer(document={"x": "y" * 5000})) as server,
        Client(server.url, most_bytes=1000) as client,
        pytest.raises(subpage.TooLarge, match="most_bytes"),
    ):
        client.capabilities()
    coded = Answer(document={}, headers={"Content-Encoding": "gzip"})
    with stub(coded) as server, Client(server.url) as client, pytest.raises(subpage.NotSubpage, match="coded"):
        client.capabilities()


def test_a_line_is_bounded_and_a_stream_may_break() -> None:
    trace = {"id": "tr_1", "vm": "vm_1", "records": 1, "violations": 1, "by_object": {}}
    vm = {"id": "vm_1", "name": ""}
    endless = Answer(body=b"x" * (LINE_BYTES + 100_000))
    broken = Answer(body=b'{"index": 1}\n{"index": 2}\n', cut=17)
    with stub(Answer(document=vm), Answer(document=trace), endless, broken) as server, Client(server.url) as client:
        found = client.vm("vm_1").trace("tr_1")
        with pytest.raises(subpage.TooLarge, match="a line"):
            list(found.exits())
        seen = found.exits()
        assert next(seen)["index"] == 1
        with pytest.raises(subpage.StreamBroken, match="broke off"):
            next(seen)


def test_a_page_that_follows_itself() -> None:
    page = Answer(document={"vms": [], "next": "/v1/vms?cursor=a"})
    with stub(page) as server, Client(server.url) as client, pytest.raises(subpage.NotSubpage, match="same again"):
        list(client.vms())


def test_a_base_path_is_kept() -> None:
    transport = Transport(BLOCKING, "http://here", None, 1)
    core = Core("http://here/proxied/", None, transport, timeout=1, patience=1, most_bytes=1)
    assert core.url == "http://here/proxied"


def test_nothing_warns_where_versions_agree(client: Client) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.version()
