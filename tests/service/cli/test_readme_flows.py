"""The README's flows by the command line alone and by the client alone: both stores, with and without tokens."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.app import app
from service.security.token_stores import tokens_of
from service.security.tokens import mint
from service.settings import Settings
from subpage import Client, Unauthenticated
from tests.support.server import Running
from tests.support.stores import serving

ROOT = Path(__file__).parents[3]
DATA = ROOT / "service" / "data"


@pytest.fixture
def token(request: pytest.FixtureRequest, store_url: str) -> str | None:
    """One that the store has, where tokens are asked for."""
    if not request.param:
        return None
    record, token = mint("readme", scope="write", now=datetime.now(UTC))
    tokens = tokens_of(Settings(store=store_url))
    assert tokens is not None
    tokens.add(record)
    return token


@pytest.fixture
def server(store_url: str, token: str | None) -> Iterator[Running]:
    with serving(store_url) as service:
        yield service


def told(line: str, variables: dict[str, str]) -> str:
    """What a line of the README says, which may set a variable or keep the last line."""
    name, command = re.fullmatch(r"(?:(\w+)=\$\()?subpage (.*?)\)?(?: \| tail -n 1)?", line).groups()  # type: ignore[union-attr]
    for variable, value in variables.items():
        command = command.replace(f"${variable}", value)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    if name is not None:
        variables[name] = result.stdout.strip()
    return result.stdout


def by_command_line() -> int:
    """Type the lines of the README that call the command, and look for what it says that they tell."""
    lines = "\n".join(re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    variables: dict[str, str] = {}
    said, seen = "", 0
    for line in lines.splitlines():
        if "subpage " in line:
            said = told(line, variables)
        elif line.startswith("curl "):
            said = ""
        elif line.startswith("# → ") and said:
            pieces = [re.escape(piece) for piece in line.removeprefix("# → ").split(" … ")]
            assert re.search(".*".join(pieces), said, re.DOTALL), said
            seen += 1
    return seen


def by_client(client: Client) -> None:
    """The same in Python."""
    vm = client.create_vm("guest", memory="1GiB")
    vm.protect(DATA / "policies" / "kernel_control_data.json")
    trace = vm.replay(DATA / "traces" / "boot.parquet")
    assert (trace.violations, trace.page_granular_violations) == (2550, 17607)
    vm.set_subpages(0x10, 0xFFFFFFFE)
    refused = vm.access(0x10040)
    assert not refused["allowed"] and refused["exits"][-1]["denied"] == "0x1"
    assert vm.access(0x10040, on_violation="grant")["landed"]
    assert [*vm.events(kinds="violation")][-1]["detail"]["gpa"] == "0x10040"
    assert vm.walk(0x2A5C6A0)["then"]["resolution"] == "violation"
    vm.delete()


@pytest.mark.jit
@pytest.mark.parametrize("token", [False, True], indirect=True, ids=["open", "tokens"])
def test_the_flows(server: Running, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SUBPAGE_SERVER", server.url)
    if token is not None:
        with Client(server.url) as nobody, pytest.raises(Unauthenticated):
            next(nobody.vms())
        monkeypatch.setenv("SUBPAGE_TOKEN", token)
    assert by_command_line() == 5
    with Client(server.url, token) as client:
        by_client(client)
