"""A guarded service from outside: where it refuses to start, the token commands, the audit log, headers, TLS."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from service.cli.app import app
from service.http.envelope import SECURITY_HEADERS
from service.security.access import NOBODY
from service.security.audit import AuditLog, outcome_of
from service.security.tokens import FileTokens, MemoryTokens, mint
from service.server import Refused, check_exposure, tls_options
from service.settings import Settings
from tests.support.server import Running, running

runner = CliRunner()


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``subpage serve`` as people run it, on a free port, and the URL that it prints."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "SUBPAGE_WARM_UP": "false", **environment}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            assert started.stdout is not None
            yield started, started.stdout.readline().strip().removeprefix("subpage is listening on ")
        finally:
            started.send_signal(signal.SIGTERM)
            started.communicate(timeout=30)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_strangers_need_tokens(host: str, tmp_path: Path) -> None:
    settings = Settings(host=host)
    from service.app import create_app

    with pytest.raises(Refused, match="no valid token"):
        check_exposure(settings, create_app(settings).state.access)
    tokens = MemoryTokens()
    record, _ = mint("n", now=datetime.now(UTC))
    tokens.add(record)
    check_exposure(settings, create_app(settings, tokens=tokens).state.access)
    tokens.revoke(record.id, datetime.now(UTC))
    with pytest.raises(Refused):
        check_exposure(settings, create_app(settings, tokens=tokens).state.access)
    check_exposure(Settings(host="127.0.0.1"), create_app(Settings()).state.access)


def test_the_command_refuses_with_the_reason() -> None:
    with process("--host", "0.0.0.0") as (started, url):
        _, told = started.communicate(timeout=60)
        assert not url and started.returncode == 2
        assert "0.0.0.0 can be reached" in told and "subpage token create" in told


def test_the_command_serves_strangers_who_have_a_token() -> None:
    secret = "0123456789" * 4
    with process("--host", "0.0.0.0", SUBPAGE_TOKEN=secret) as (_, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/livez").status_code == 200
        assert httpx2.get(f"{url}/v1/vms").status_code == 401
        assert httpx2.get(f"{url}/v1/vms", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


def test_token_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, audit = tmp_path / "tokens.db", tmp_path / "audit.jsonl"
    monkeypatch.setenv("SUBPAGE_TOKEN_FILE", str(file))
    monkeypatch.setenv("SUBPAGE_AUDIT_LOG", str(audit))
    made = runner.invoke(app, ["token", "create", "ci", "--scope", "write", "--tenant", "red", "--expires", "90d"])
    assert made.exit_code == 0, made.output
    token = made.stdout.strip()
    (record,) = FileTokens(file).all()
    assert record.proves(token.split("_", 2)[2]) and (record.scope, record.tenant) == ("write", "red")
    assert record.expires is not None and (record.expires - record.created).days == 90
    listed = runner.invoke(app, ["token", "list"]).stdout
    assert re.search(rf"{record.id}  valid +write  red .* ci$", listed, re.MULTILINE)
    assert token.split("_", 2)[2] not in listed
    assert runner.invoke(app, ["token", "revoke", record.id]).exit_code == 0
    assert "revoked" in runner.invoke(app, ["token", "list"]).stdout
    assert runner.invoke(app, ["token", "revoke", "nothing"]).exit_code == 1
    events = [json.loads(line)["event"] for line in audit.read_text().splitlines()]
    assert events == ["token-created", "token-revoked"] and token.split("_", 2)[2] not in audit.read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--scope", "root"],
        ["--tenant", "No Such"],
        ["--expires", "soon"],
        ["--expires", "2001-01-01"],
        ["--expires", "999999999w"],
    ],
)
def test_token_commands_refuse(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBPAGE_TOKEN_FILE", str(tmp_path / "tokens.db"))
    assert runner.invoke(app, ["token", "create", "x", *options]).exit_code == 2
    assert not (tmp_path / "tokens.db").exists()


def test_tokens_need_a_place() -> None:
    told = runner.invoke(app, ["token", "list"])
    assert told.exit_code == 2 and "SUBPAGE_TOKEN_FILE" in told.output


def test_a_running_service_notices(tmp_path: Path) -> None:
    """Tokens that another process makes and revokes count without a restart, and the first one closes the service."""
    tokens = FileTokens(tmp_path / "tokens.db")
    settings = Settings(warm_up=False, token_file=tmp_path / "tokens.db", token_refresh=0.01)
    with running(settings) as service:

        def becomes(status: int, **headers: str) -> None:
            until = time.monotonic() + 30
            while service.client.get("/v1/vms", headers=headers).status_code != status:
                assert time.monotonic() < until

        becomes(200)
        record, token = mint("n", now=datetime.now(UTC))
        tokens.add(record)
        becomes(401)
        becomes(200, Authorization=f"Bearer {token}")
        tokens.revoke(record.id, datetime.now(UTC))
        becomes(401, Authorization=f"Bearer {token}")


def test_known_tokens_survive_an_unreadable_store(caplog: pytest.LogCaptureFixture) -> None:
    record, token = mint("n", now=datetime.now(UTC))

    class Failing(MemoryTokens):
        asked = 0

        def all(self) -> Any:
            self.asked += 1
            if self.asked > 1:
                raise OSError("no disk")
            return super().all()

    with running(Settings(warm_up=False, token_refresh=0.001), Failing([record])) as service:
        until = time.monotonic() + 30
        while "cannot be read again" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.001)
        assert service.client.get("/v1/vms", headers={"Authorization": f"Bearer {token}"}).status_code == 200


@pytest.fixture
def audited(tmp_path: Path) -> Iterator[tuple[Running, Path, dict[str, str]]]:
    record, token = mint("tool", tenant="red", scope="write", now=datetime.now(UTC))
    file = tmp_path / "audit.jsonl"
    settings = Settings(warm_up=False, audit_log=str(file))
    with running(settings, MemoryTokens([record])) as service:
        yield service, file, {"Authorization": f"Bearer {token}", "X-Request-Id": "my-7"}


def test_mutations_are_audited(audited: tuple[Running, Path, dict[str, str]]) -> None:
    service, file, headers = audited
    home = service.client.post("/v1/vms", json={"spp": True}, headers=headers).headers["Location"]
    service.client.get(home, headers=headers)
    service.client.put(f"{home}/subpages?gfn=0", json={"access": ["0x0"]}, headers=headers)
    service.client.delete(home)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["method"], line["path"], line["status"], line["outcome"]) for line in lines] == [
        ("POST", "/v1/vms", 201, "done"),
        ("PUT", f"{home}/subpages", 422, "refused"),
        ("DELETE", home, 401, "refused"),
    ]
    assert {line["name"] for line in lines[:2]} == {"tool"} and lines[2]["name"] == ""
    assert {line["tenant"] for line in lines[:2]} == {"red"} and lines[0]["request_id"] == "my-7"
    assert lines[1]["query"] == "gfn=0"
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_audit_log_only_grows(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    for number in range(2):
        log = AuditLog(str(file))
        log.write("test", NOBODY, number=number)
        log.close()
        log.close()
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == [0, 1]


def test_a_lost_line_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AuditLog(str(tmp_path)).write("test", NOBODY, number=7)
    assert "a line of the audit log was lost" in caplog.text and '"number": 7' in caplog.text


def test_where_the_audit_log_goes(capsys: pytest.CaptureFixture[str]) -> None:
    AuditLog(None).write("silent", None)
    AuditLog(None, lambda: True).write("guarded", None)
    AuditLog("-").write("always", None)
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["guarded", "always"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "done"),
        (304, "done"),
        (101, "done"),
        (404, "refused"),
        (499, "abandoned"),
        (0, "abandoned"),
        (503, "failed"),
    ],
)
def test_outcomes(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome


def test_headers_of_every_reply(service: Running) -> None:
    for path in ("/v1/vms", "/nowhere", "/v1/vms/x", "/static/swagger-ui/LICENSE", "/livez", "/openapi.json"):
        reply = service.client.get(path)
        for name, value in SECURITY_HEADERS:
            assert reply.headers[name.decode()] == value.decode(), path
        assert reply.headers["X-Request-Id"]
    page = service.client.get("/docs").headers
    assert "unsafe" not in page["Content-Security-Policy"] and "Access-Control-Allow-Origin" not in page


def test_request_ids(service: Running) -> None:
    for given in ("a", "0" * 128, "trace:1.2_3~4-5"):
        assert service.client.get("/livez", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given
    for given in ("", "0" * 129, "a b", 'x"'):
        assert service.client.get("/livez", headers={"X-Request-Id": given}).headers["X-Request-Id"] != given
    ids = {service.client.get("/livez").headers["X-Request-Id"] for _ in range(3)}
    assert len(ids) == 3


def test_a_defect_has_its_headers_and_its_id(tmp_path: Path) -> None:
    settings = Settings(warm_up=False, audit_log=str(tmp_path / "a"))
    with running(settings) as service:
        # The state of an application is no plain object: a monkeypatch would take the registry away for good.
        registry, service.app.state.registry = service.app.state.registry, None
        reply = httpx2.post(f"{service.url}/v1/vms", json={}, headers={"X-Request-Id": "r1"})
        service.app.state.registry = registry
        assert reply.status_code == 500 and reply.json()["code"] == "internal-error"
        assert reply.headers["X-Request-Id"] == "r1" and reply.headers["X-Content-Type-Options"] == "nosniff"
    assert json.loads((tmp_path / "a").read_text())["outcome"] == "failed"


def test_only_local_names_without_tokens(service: Running) -> None:
    reply = service.client.get("/v1/vms", headers={"Host": "attacker.example"})
    assert reply.status_code == 403 and reply.json()["field"] == "Host"
    assert service.client.get("/livez", headers={"Host": "attacker.example"}).status_code == 200


def test_cors_is_off_unless_configured(service: Running) -> None:
    origin = {"Origin": "https://tool.example", "Access-Control-Request-Method": "GET"}
    refused = httpx2.options(f"{service.url}/v1/vms", headers=origin)
    assert refused.status_code == 405 and "Access-Control-Allow-Origin" not in refused.headers
    with running(Settings(warm_up=False, cors_origins=("https://tool.example",))) as open_to_tool:
        allowed = httpx2.options(f"{open_to_tool.url}/v1/vms", headers=origin)
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://tool.example"
        other = {**origin, "Origin": "https://other.example"}
        assert "Access-Control-Allow-Origin" not in httpx2.options(f"{open_to_tool.url}/v1/vms", headers=other).headers


def test_tls_options_are_handed_on(tmp_path: Path) -> None:
    assert tls_options(Settings()) == {}
    options = tls_options(
        Settings(
            tls_certificate=tmp_path / "c", tls_key=tmp_path / "k", tls_key_password="p", tls_client_ca=tmp_path / "a"
        )  # type: ignore[arg-type]
    )
    assert options == {
        "ssl_certfile": str(tmp_path / "c"),
        "ssl_keyfile": str(tmp_path / "k"),
        "ssl_keyfile_password": "p",
        "ssl_ca_certs": str(tmp_path / "a"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make a certificate")
def test_it_speaks_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    with process(SUBPAGE_TLS_CERTIFICATE=str(certificate), SUBPAGE_TLS_KEY=str(key)) as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        reply = httpx2.get(f"{url}/livez", verify=context)
        assert reply.status_code == 200 and "max-age" in reply.headers["Strict-Transport-Security"]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as plain:
            plain.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP/1.1 200")
