"""What goes wrong at the command line is told in one sentence that says what to do, and nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.app import app
from service.cli.statuses import Status
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.processes import free_port
from tests.support.server import Running, running

ROOT = Path(__file__).parents[3]
POLICY = {"name": "p", "objects": [{"name": "o", "gpa": "0x2080", "size": 64}]}
TRACE = bodies.table(gpa=[0x2080])


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUBPAGE_CONFIG", "")
    monkeypatch.setenv("SUBPAGE_STORE", f"sqlite:///{tmp_path}/subpage.db")
    monkeypatch.delenv("SUBPAGE_TOKEN", raising=False)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY), encoding="utf-8")
    return str(path)


def said(*arguments: str, status: int = 1) -> str:
    """The one line of a command that fails."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    for raw in ("Errno", "Error(", "Traceback"):
        assert raw not in line
    return line


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from service.cli.app import app; app(prog_name='subpage')", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


# ---- services that are not there, or are something else


COMMANDS = [("vm", "list"), ("vm", "show", "vm_1"), ("events", "vm_1"), ("events", "vm_1", "--after", "latest")]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_service(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told = f"no service on {url}: start one with `subpage serve`, or say where it is"
    name = " ".join(command[:2] if command[0] == "vm" else command[:1])
    assert said(*command, "--server", url, status=Status.NO_SERVICE) == f"subpage {name}: {told}"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("url", "told", "status"),
    [
        ("http://nowhere.invalid", "there is no host of the name in http://nowhere.invalid", Status.NO_SERVICE),
        ("ftp://127.0.0.1", "--server ftp://127.0.0.1: must be a URL such as http://127.0.0.1:8000", Status.USAGE),
        ("http://[::1", "--server http://[::1: must be a URL", Status.USAGE),
        ("http://127.0.0.1:port", "--server http://127.0.0.1:port: must be a URL", Status.USAGE),
        ("http://", "--server http://: must be a URL", Status.USAGE),
    ],
)
def test_urls_that_lead_nowhere(command: tuple[str, ...], url: str, told: str, status: int) -> None:
    assert told in said(*command, "--server", url, status=status)


class _Other(BaseHTTPRequestHandler):
    """Another service: ``/json`` answers with a list, ``/page`` with a page."""

    content = b"[]"
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def other() -> Iterator[Callable[[int, bytes], str]]:
    servers: list[HTTPServer] = []

    def start(status: int, content: bytes) -> str:
        handler = type("Handler", (_Other,), {"status": status, "content": content})
        servers.append(server := HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=server.serve_forever).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "content"), [(200, b"[]"), (200, b"<html>"), (200, b"{}"), (404, b"<html>"), (500, b"7")]
)
def test_another_service(other: Callable[[int, bytes], str], status: int, content: bytes) -> None:
    url = other(status, content)
    assert url in said("vm", "list", "--server", url, status=Status.NO_SERVICE)


def test_something_that_is_not_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        told = said("vm", "list", "--server", url, status=Status.NO_SERVICE)
        thread.join()
    assert "does not speak HTTP" in told


def test_http_where_https_was_meant(service: Running) -> None:
    url = service.url.replace("http:", "https:")
    assert "perhaps it is http" in said("vm", "list", "--server", url, status=Status.NO_SERVICE)


def test_authorities_that_are_none(tmp_path: Path, policy: str) -> None:
    assert "there is no such file" in said("vm", "list", "--url", "https://127.0.0.1:9", "--ca", str(tmp_path / "none"))
    assert "no certificates in PEM form" in said("vm", "list", "--url", "https://127.0.0.1:9", "--ca", policy)


def test_tokens_that_are_wrong(service: Running) -> None:
    known, _ = mint("known", now=datetime.now(UTC))
    _, token = mint("unknown", now=datetime.now(UTC))
    with running(Settings(warm_up=False, store="memory"), MemoryTokens([known])) as guarded:
        for given in ((), ("--token", token)):
            told = said("vm", "list", "--server", guarded.url, *given, status=Status.NOT_ALLOWED)
            assert told.startswith("subpage vm list: 401: ") and "--token-file or SUBPAGE_TOKEN gives one" in told
    assert "printable ASCII" in said("vm", "list", "--url", service.url, "--token", "tök")
    assert "printable ASCII" in said("events", "vm_1", "--url", service.url, "--token", "a\nb")
    assert "404: " in said("vm", "show", "vm_0", "--url", service.url, status=Status.NOT_FOUND)


# ---- ports


def test_a_port_in_use(client: ContractClient) -> None:
    port = str(client.base_url.port)
    result = process("serve", "--port", port)
    assert result.returncode == 3 and result.stdout == ""
    told = f"port {port} of 127.0.0.1 is in use: stop what listens there, or choose another by --port (0: any)"
    assert result.stderr == f"subpage serve: {told}\n"


def test_hosts_that_are_not_here() -> None:
    assert "no address of this machine" in process("serve", "--host", "192.0.2.1", SUBPAGE_TOKEN="t" * 40).stderr
    told = process("serve", "--host", "nowhere.invalid", SUBPAGE_TOKEN="t" * 40).stderr
    assert told == "subpage serve: there is no host nowhere.invalid: choose another with --host\n"


# ---- files


def test_traces_that_are_none(tmp_path: Path, policy: str) -> None:
    whole = tmp_path / "whole.parquet"
    whole.write_bytes(bodies.FORMATS["parquet"](TRACE).content)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    empty = tmp_path / "empty.arrow"
    empty.touch()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    odd = tmp_path / "trace.csv"
    odd.touch()
    for path in (cut, empty, broken):
        assert said("replay", str(path), "--policy", policy).startswith(f"subpage replay: {path}: ")
    for name in ("replay", "demo"):
        given = [name, *(() if name == "replay" else ("--trace",))]
        assert said(*given, str(folder), "--policy", policy) == f"subpage {name}: {folder}: is a folder, not a file"
        assert said(*given, str(tmp_path / "no.bin"), "--policy", policy).endswith("no.bin: there is no such file")
    assert "the table has no line of names" in said("replay", str(odd), "--policy", policy)
    assert "in one of .parquet, .arrow" in said("demo", "--trace", str(odd), "--policy", policy)


def test_policies_that_are_none(tmp_path: Path) -> None:
    trace = tmp_path / "trace.parquet"
    trace.write_bytes(bodies.FORMATS["parquet"](TRACE).content)
    missing = tmp_path / "missing.json"
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"objects": [{**POLICY["objects"][0]}, {"name": "x", "gpa": 1}]}))  # type: ignore[index]
    for command in (("replay", str(trace)), ("demo", "--trace", str(trace))):
        named = f"subpage {command[0]}: "
        assert said(*command, "--policy", str(missing)) == f"{named}{missing}: there is no such file"
        assert said(*command, "--policy", str(policy)) == f"{named}{policy}: objects[1].size: is required"


def test_settings_that_are_wrong(tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBPAGE_MAX_VMS", "many")
    for command in (
        ("replay", policy, "--policy", policy),
        ("backup", str(tmp_path / "b")),
        ("restore", policy),
        ("token", "list"),
        ("config",),
        ("serve",),
    ):
        assert said(*command, status=2).startswith("SUBPAGE_MAX_VMS: ")
    monkeypatch.setenv("SUBPAGE_CONFIG", str(tmp_path))
    assert said("config", status=2) == f"SUBPAGE_CONFIG: {tmp_path}: is a folder, not a file"


def test_stores_and_backups_that_are_none(tmp_path: Path, policy: str) -> None:
    backup = str(tmp_path / "backup")
    assert said("backup", backup) == f"subpage backup: there is no store at {tmp_path}/subpage.db"
    assert "SUBPAGE_STORE" in said("backup", backup, "--store", "mysql://x", status=2)
    assert said("restore", backup) == f"subpage restore: {backup}: there is no such file"
    assert said("restore", str(tmp_path)) == f"subpage restore: {tmp_path}: is a folder, not a file"
    assert said("restore", policy).startswith(f"subpage restore: {policy}: ")
    url = f"sqlite:///{policy}"
    assert f"the store {url} cannot be used" in said("backup", backup, "--set", f"store={url}")
    assert said("token", "list", "--set", f"store={url}").endswith(f"the store {url}: the file is not a database")
    assert policy in said("token", "list", "--set", f"token_file={policy}")
    assert "there is no token with id x" in said("token", "revoke", "x", "--set", f"token_file={tmp_path}/tokens")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_others_keep_to_themselves(policy: str) -> None:
    Path(policy).chmod(0)
    assert said("replay", "x.bin", "--policy", policy).endswith("this user may not read it")


# ---- completion


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
def test_completion_for_a_shell_that_is_none(option: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("mine\n")
    result = process(option, "nosuch", HOME=str(home), SHELL="/bin/bash")
    assert result.returncode == 2 and "nosuch" in result.stderr
    assert [path.name for path in home.iterdir()] == [".bashrc"] and (home / ".bashrc").read_text() == "mine\n"
