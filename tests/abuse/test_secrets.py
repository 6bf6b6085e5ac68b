"""Tokens and passwords are in no log and no listing, however they are given; and no client writes a line of a log."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from service.cli.app import app
from service.security.tokens import without_tokens
from service.storage.urls import StoreUrl, shown
from service.telemetry.logs import TextFormatter, printable
from tests.abuse.frames import OPENING
from tests.abuse.process import TOKEN, Service, head, serving
from tests.support.waiting import until

STRANGE = "sp_0123456789ab_" + "Zz0-" * 10 + "abc"


def said_last(victim: Service, *requests: bytes) -> None:
    """Send requests, each on its own connection, and wait for what answers them."""
    for request in requests:
        with victim.connect() as connection:
            connection.sendall(request)
            assert connection.recv(1 << 16)


@pytest.fixture(scope="module", params=["text", "json"])
def talkative(request: pytest.FixtureRequest) -> Iterator[Service]:
    with serving(log_level="debug", access_log=True, log_format=request.param) as server:
        yield server


def test_no_token_in_any_log(talkative: Service) -> None:
    """In the header, in the subprotocol, in the query and in the path, of a request and of an opening; the body's
    messages; the fixed token and one that reads like a kept one."""
    with talkative.client() as client:
        vm = client.post("/v1/vms", json={}).headers["Location"]
    tool = f"{vm}/introspection"
    for token in (TOKEN, STRANGE):
        said_last(
            talkative,
            head("GET", "/v1/vms", token),
            head("POST", f"/v1/vms?token={token}&access_token={token}", token, "Content-Length: 0"),
            head("DELETE", f"/v1/vms/{token}", None, f"Sec-WebSocket-Protocol: {token}"),
            head("GET", tool, token, *OPENING),
            head("GET", tool, None, *OPENING, f"Sec-WebSocket-Protocol: subpage.bearer.{token}"),
            head("GET", f"{tool}?token={token}", token, *OPENING),
            head("GET", "/livez", None, f"Cookie: {token}", "Upgrade: h2c", "Connection: Upgrade"),
            f"NONSENSE {token}\r\n\r\n".encode(),
        )
    log = talkative.said()
    assert "/v1/vms" in log, "requests are logged"
    for secret in (TOKEN, STRANGE.split("_", 2)[2], base64.b64encode(TOKEN.encode()).decode()):
        assert secret not in log
    assert "Authorization" not in log and "subpage.bearer" not in log


def test_there_is_no_level_below_debug() -> None:
    done = CliRunner().invoke(app, ["--set", "log_level=trace", "config"])
    assert done.exit_code == 2 and "debug" in done.output


def test_of_libraries_only_warnings_are_logged(talkative: Service) -> None:
    quiet = re.compile(r'^(?:DEBUG|INFO) (\S+):|"level": "(?:debug|info)", "logger": "(\S+)"', re.MULTILINE)
    names = {first or second for first, second in quiet.findall(talkative.said())}
    assert names and all(name.startswith("subpage") for name in names)


@pytest.mark.parametrize(
    "escape", ["%0a", "%0d%0a", "%1b%5b2K", "%e2%80%a8", "%c2%85", "%e2%80%ae", "%00", "%7f", "%0c"]
)
def test_no_client_writes_a_line(escape: str) -> None:
    with serving(log_format="text", access_log=True, audit_log="-") as victim:
        said_last(victim, head("GET", f"/v1/{escape}ERROR subpage: the disk is full".replace(" ", "%20"), TOKEN))
        until(lambda: "the disk is full" in victim.said())
        log = victim.said()
    assert all(letter.isprintable() for letter in log.replace("\n", ""))
    assert not re.search("^ERROR", log, re.MULTILINE) and len(log.splitlines()) == log.count("\n")


@given(st.text())
@example("a\nERROR b\x1b[2K\u2028\x85\u202e\ud800")
def test_a_record_is_one_line_and_nothing_moves(text: str) -> None:
    assert printable(text).isprintable()
    record = logging.makeLogRecord({"levelname": "INFO", "name": "n", "msg": "%s", "args": (text,)})
    try:
        raise ValueError(text)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *rest = TextFormatter("%(levelname)s %(name)s: %(message)s").format(record).split("\n")
    assert first.isprintable() and all(line.startswith("  ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("secret", ["a secret/with=signs&more+0123456789", 'quotes"and\\backslashes-0123456789'])
def test_a_fixed_token_in_other_spellings(secret: str) -> None:
    for spelling in (secret, quote(secret), quote(secret, safe="")):
        assert "0123456789" not in without_tokens(f"GET /?t={spelling} HTTP/1.1", secret)


# Passwords that readers of URLs do not agree about, among others.
PASSWORDS = [
    "hunter2",
    "hun@ter2",
    "@hunter2",
    "hunter2@",
    "hun/ter2",
    "hun?ter2",
    "hun#ter2",
    "hun:ter2",
    "hun&ter2=x",
    "hun ter2",
    "hun%40ter2",
    "12/34@hunter2",
    "1/2?hunter2",
    "hun[ter2]",
    "hünter2",
    "hun\\ter2",
]
PLACES = [
    "postgresql://user:{}@host/db",
    "postgresql://user:{}@host:5432/db?sslmode=require",
    "postgres://user:{}@[::1]/db",
    "postgresql://:{}@host/db",
    "postgresql://user:{}@/db",
    "postgresql://host/db?password={}",
    "postgresql://user@host/db?user=u&password={}",
    "postgresql://host/db?sslpassword={}&sslmode=require",
    "postgresql://host/db?PASSWORD={}",
    "postgresql://host/db?pass%77ord={}",
    "postgresql://host/db?passfile=x;password={}",
    "postgresql://host/db?options=-c%20password={}",
    "postgresql://host/db?{}",
    "postgresql://user:x@host/db?password={}",
    "postgresql+psycopg://user:{}@host/db",
    "mysql://user:{}@host/db",
    "POSTGRESQL://user:{}@host/db",
]


def pieces(password: str) -> list[str]:
    """What of a password could be recognised."""
    return [piece for piece in re.split(r"[^A-Za-z0-9ü]+", password) if piece and piece not in ("x", "1", "2", "12")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_of_a_store_is_not_shown(place: str, password: str) -> None:
    text = place.format(password)
    told = shown(text)
    try:
        told += StoreUrl.parse(text).shown
    except ValueError as refused:
        told += str(refused)
    for piece in pieces(password):
        assert piece not in told.replace("letter or digit", "")


@pytest.mark.parametrize("place", PLACES[::4])
def test_no_command_shows_a_password(place: str) -> None:
    for password in ("hun@ter2", "hun?ter2"):
        text = place.format(password).replace("host", "127.0.0.1:1")
        for arguments in (["--set", f"store={text}", "config"], ["backup", "/nonexistent/file", "--store", text]):
            done = CliRunner().invoke(app, arguments, env={"PGCONNECT_TIMEOUT": "2"})
            told = done.output + str(done.exception or "")
            assert "hun" not in told and "ter2" not in told


@given(st.text(min_size=1), st.sampled_from(PLACES))
def test_no_password_is_shown(password: str, place: str) -> None:
    """Between marks that can be found again: neither is shown, whatever is between them."""
    assert "MARK" not in shown(place.format(f"MARK{password}MARK"))


def test_what_is_no_secret_is_shown() -> None:
    assert shown("postgresql://subpage:x@db.example:5432/subpage?sslmode=require&password=y") == (
        "postgresql://subpage:(hidden)@db.example:5432/subpage?sslmode=require&(hidden)"
    )
    for text in ("memory", "sqlite:////var/lib/a@b.db", "postgresql://subpage@host/db", "postgresql:///db"):
        assert shown(text) == text


@pytest.mark.parametrize(
    "store",
    ["postgresql://user:hun@ter2@127.0.0.1:1/db", "postgresql://127.0.0.1:1/db?password=hunter2&sslpassword=hunter2"],
)
def test_an_outage_shows_no_password(store: str) -> None:
    with serving(store=store, log_level="debug", log_format="text") as victim:
        until(lambda: "cannot be reached" in victim.said() and "tokens cannot be read" in victim.said())
        log = victim.said()
    assert "hun" not in log and "ter2" not in log and "Traceback" not in log


def test_a_wrong_flag_shows_no_password() -> None:
    for text in ("stroe=postgresql://u:hunter2@h/d", "postgresql://u:hunter2@h/d", "postgresql://u:hun=ter2@h/d"):
        done = CliRunner().invoke(app, ["--set", text, "config"])
        assert done.exit_code == 2 and "hun" not in done.output
