"""The command: settings from flags, environment and file, what is in effect, and the machines of a service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.app import app
from service.cli.statuses import Status
from service.security.tokens import MemoryTokens, mint
from service.settings import BadFile, Settings
from tests.contract.client import ContractClient
from tests.support.server import Running, running

runner = CliRunner()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config`` sets the variable for the rest of the process; here that is the rest of the test."""
    monkeypatch.setenv("SUBPAGE_CONFIG", "")
    monkeypatch.delenv("SUBPAGE_TOKEN", raising=False)


def run(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str, status: int = 2) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == status, result.output
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    return result.output


def test_flags_outrank_the_environment_outranks_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "subpage.toml"
    file.write_text('max_vms = 1\nport = 1\nbusy_timeout = 1.5\ncors_origins = ["https://a.example"]\n')
    monkeypatch.setenv("SUBPAGE_MAX_VMS", "2")
    monkeypatch.setenv("SUBPAGE_PORT", "2")
    lines = run("--config", str(file), "--set", "port=3", "config").splitlines()
    assert "port = 3  # flag" in lines
    assert "max_vms = 2  # environment" in lines
    assert f"busy_timeout = 1.5  # {file}" in lines
    assert f'cors_origins = ["https://a.example"]  # {file}' in lines
    assert "max_page_size = 1000" in lines
    assert "# spool_dir = none" in lines


def test_what_is_printed_can_be_a_file(tmp_path: Path) -> None:
    printed = run(
        "--set", "max_vms=7", "--set", 'cors_origins=["https://a.example"]', "--set", "log_format=json", "config"
    )
    file = tmp_path / "subpage.toml"
    file.write_text(printed)
    assert set(tomllib.loads(printed)) <= set(Settings.model_fields)
    again = {line.partition("  # ")[0] for line in run("--config", str(file), "config").splitlines()}
    assert again == {line.partition("  # ")[0] for line in printed.splitlines()}


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBPAGE_TOKEN", "t0psecret" * 5)
    monkeypatch.setenv("SUBPAGE_TLS_KEY_PASSWORD", "hunter2")
    monkeypatch.setenv("SUBPAGE_AUDIT_LOG", "postgresql://user:hunter2@host/audit")
    printed = run("config")
    assert "t0psecret" not in printed and "hunter2" not in printed
    assert 'token = "(hidden)"  # environment' in printed and "postgresql://user:(hidden)@host/audit" in printed


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--set", "nonsense=1"], "nonsense"),
        (["--set", "max_vms"], "NAME=VALUE"),
        (["--set", "max_vms=0"], "SUBPAGE_MAX_VMS"),
        (["--set", "cors_origins=[a"], "JSON"),
        (["--set", "token=short"], "SUBPAGE_TOKEN"),
        (["--config", "/no/such/file"], "/no/such/file"),
    ],
)
def test_settings_that_are_refused(given: list[str], told: str) -> None:
    assert told in refused(*given, "config")


def test_settings_after_the_command_outrank_those_before(tmp_path: Path) -> None:
    lines = run("--set", "port=1", "--set", "max_vms=7", "config", "--set", "port=2").splitlines()
    assert "port = 2  # flag" in lines and "max_vms = 7  # flag" in lines
    assert "nonsense" in refused("config", "--set", "nonsense=1")
    kept = f"token_file={tmp_path / 'tokens'}"
    assert run("token", "create", "name", "--set", kept).startswith("sp_")
    assert "name" in run("token", "list", "--set", kept) and (tmp_path / "tokens").exists()
    assert "memory" in refused("backup", str(tmp_path / "b"), "--set", "store=memory", status=1)


@pytest.mark.parametrize("content", ["max_vms = ", "nonsense = 1", "max_vms = 'many'", "\xff"])
def test_files_that_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "subpage.toml"
    file.write_bytes(content.encode("latin-1"))
    assert "SUBPAGE_" in refused("--config", str(file), "config")


def test_a_file_without_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "subpage.toml"
    file.write_text("max_vms = 5\n")
    monkeypatch.setenv("SUBPAGE_CONFIG", str(file))
    assert Settings().max_vms == 5 and Settings(max_vms=6).max_vms == 6
    file.unlink()
    with pytest.raises(BadFile):
        Settings()


def test_vm_list_and_show(client: ContractClient, service: Running, make_vm: Callable[..., str]) -> None:
    made = make_vm(name="a guest").rpartition("/")[2]
    (row,) = [line for line in run("vm", "list", "--url", service.url).splitlines() if made in line]
    assert row.split()[-2:] == ["a", "guest"] and "16 MiB" in row and "yes" in row
    shown = run("vm", "show", made, "--url", service.url)
    assert f"id         {made}"[:10].split()[0] == "id" and "a guest" in shown and "16 MiB" in shown
    document = json.loads(run("vm", "show", made, "--url", service.url, "--json"))
    counters = client.get(f"/v1/vms/{made}/counters").json()["counters"]
    assert document.pop("counters") == counters and document == client.get(f"/v1/vms/{made}").json()
    assert made in [vm["id"] for vm in json.loads(run("vm", "list", "--url", service.url, "--json"))]


def test_vm_list_follows_pages() -> None:
    with running(Settings(warm_up=False, page_size=2)) as service:
        made = [service.client.post("/v1/vms", json={"name": str(number)}).json()["id"] for number in range(5)]
        assert [vm["id"] for vm in json.loads(run("vm", "list", "--url", service.url, "--json"))] == made


def test_vm_commands_need_a_token_where_the_service_does(monkeypatch: pytest.MonkeyPatch) -> None:
    record, token = mint("n", now=datetime.now(UTC))
    with running(Settings(warm_up=False), MemoryTokens([record])) as service:
        assert "401" in refused("vm", "list", "--url", service.url, status=Status.NOT_ALLOWED)
        assert "ID" in run("vm", "list", "--url", service.url, "--token", token)
        monkeypatch.setenv("SUBPAGE_TOKEN", token)
        assert "404" in refused("vm", "show", "vm_0", "--url", service.url, status=Status.NOT_FOUND)


def complete(words: str, **environment: str) -> list[str]:
    """What bash is offered after ``words``."""
    result = subprocess.run(
        [sys.executable, "-c", "from service.cli.app import app; app(prog_name='subpage')"],
        env={
            **os.environ,
            "_SUBPAGE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"subpage {words}",
            "COMP_CWORD": str(len(words.split(" "))),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.split()


def test_shell_completion(service: Running, make_vm: Callable[..., str]) -> None:
    made = make_vm().rpartition("/")[2]
    assert {"serve", "config", "token", "vm", "demo"} <= set(complete(""))
    assert complete("token create x --scope ") == ["read", "write", "admin"]
    assert "max_vms=" in complete("--set max_v")
    assert made in complete("vm show ", SUBPAGE_URL=service.url)
    assert complete("vm show ", SUBPAGE_URL="http://127.0.0.1:9") == []
