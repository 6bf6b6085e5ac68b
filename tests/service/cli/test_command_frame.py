"""The frame of the command line: mistakes, statuses, examples, where the service is, and how things are printed."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

import subpage
from service.cli import numbers, show
from service.cli.app import app
from service.cli.commands import examples_of
from service.cli.connection import failure_of
from service.cli.statuses import MEANINGS, Status
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.http import new_vm
from tests.support.server import Running, running
from tests.support.stores import serving

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "command-line.md"
GUEST, TOKEN_ID, JOB = "vm_3f9c2a1be07d4c55", "3f9c2a1be07d", "job_5d2f80a96c1be743"
FOOTPRINT = "fp_1b7e0c55d2a94f63"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUBPAGE_CONFIG", "")
    monkeypatch.setenv("SUBPAGE_STORE", f"sqlite:///{tmp_path}/subpage.db")
    for name in ("SUBPAGE_TOKEN", "SUBPAGE_TOKEN_PATH", "SUBPAGE_SERVER", "SUBPAGE_URL"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    for name, found in (group or get_command(app)).commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*path, name))
        else:
            yield (*path, name), found


ALL = dict(commands())


# ---- statuses


def test_the_page_has_the_table_of_statuses() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(number): about for number, about in rows} == {int(status): MEANINGS[status] for status in Status}


def test_the_page_names_every_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [words for words in ALL if f"`subpage {' '.join(words)}" not in text] == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (subpage.Unauthenticated({"detail": "d"}, 401), Status.NOT_ALLOWED),
        (subpage.Forbidden({"detail": "d"}, 403), Status.NOT_ALLOWED),
        (subpage.NotFound({"detail": "d"}, 404), Status.NOT_FOUND),
        (subpage.Problem({"detail": "d", "index": 7}, 422), Status.FAILED),
        (subpage.Unreachable("away"), Status.NO_SERVICE),
        (subpage.Untrusted("certificate"), Status.NO_SERVICE),
        (subpage.StreamBroken("broken"), Status.NO_SERVICE),
        (subpage.NotSubpage("other"), Status.NO_SERVICE),
        (subpage.BadInput("a directory"), Status.FAILED),
        (subpage.Interrupted("ended", "cancelled"), Status.FAILED),
    ],
)
def test_what_the_client_raises_has_a_status(error: Exception, status: Status) -> None:
    failure = failure_of(error)
    assert failure.status == status and str(failure)
    if status is Status.FAILED and isinstance(error, subpage.Problem):
        assert str(failure) == "422: record 7: d"


# ---- mistakes


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("vmm list", "there is no command 'vmm': did you mean `subpage vm`?"),
        ("vm lst", "there is no command 'lst': did you mean `subpage vm list`?"),
        ("list", "did you mean `subpage vm list` or `subpage footprint list` or `subpage token list`?"),
        ("xyzzy", "there is no command 'xyzzy'; see `subpage --help`"),
        ("vm list --jsn", "subpage vm list: there is no option --jsn: did you mean `--json`?"),
        ("replay x.bin --polcy p", "did you mean `--policy` or `--policies`?"),
        ("vm create --memory 1GB2", "must be a size such as 1GiB, 512M or 0x1000, not 1GB2"),
        ("vm create --slot 5", "must be GPA:SIZE, such as 0:3GiB"),
        ("bitmap get g 0x", "must be a number such as 0x100000 or 4096, not 0x"),
        ("bitmap set g 1 0x100000000", "must be a word of 32 bits"),
        ("bitmap set g 1", "give words, or a file with --from"),
        ("bitmap set g 1 2 3 -n 4", "4 pages need one word, or 4, not 2"),
        ("protect g", "give a file, or objects with --object"),
        ("protect g --object table", "must be NAME=GPA:SIZE"),
        ("access g", "give an address: GPA, or --gva"),
        ("access g 1 --data 0", "must be bytes in hex"),
        ("walk g", "missing argument"),
        ("replay x.bin", "give the policy to replay against, or with --vm a machine"),
        ("replay x.bin --vm g --policy p", "`subpage protect g p` comes before"),
        ("replay x.bin --vm g --keep", "is for a machine that --server is told to make"),
        ("jobs --wait", "is for one job"),
        ("policy show", "give a file, or a machine with --vm"),
    ],
)
def test_mistakes_are_told_in_a_line(typed: str, told: str) -> None:
    result = run(*typed.split())
    assert result.exit_code == Status.USAGE and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("subpage") and told in line


def test_numbers() -> None:
    assert [numbers.size_of(text) for text in ("1GiB", "512M", "0x1000", "4k", "7", "", "-1", "1 PiB")] == [
        1 << 30, 512 << 20, 4096, 4096, 7, None, None, None,
    ]  # fmt: skip
    assert numbers.parse_range("0x1000:1MiB") == (0x1000, 0x101000)
    assert numbers.parse_signed("0xffffffffffe00000") == -0x200000 and numbers.parse_signed("-5") == -5
    for bad in ("", "x", "-1", str(1 << 64)):
        with pytest.raises(typer.BadParameter):
            numbers.parse_number(bad)


# ---- where the service is


def test_the_server_and_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, token = mint("n", now=datetime.now(UTC))
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    with running(Settings(warm_up=False, store="memory"), MemoryTokens([record])) as service:
        monkeypatch.setenv("SUBPAGE_SERVER", service.url)
        assert run("vm", "list").exit_code == Status.NOT_ALLOWED
        for given in (("--token", token), ("--token-file", str(file))):
            assert run("vm", "list", *given).exit_code == 0
        refused = run("vm", "create", "--token", token)
        assert refused.exit_code == Status.NOT_ALLOWED and "403: " in refused.stderr
        for name, value in (("SUBPAGE_TOKEN_PATH", str(file)), ("SUBPAGE_TOKEN", token)):
            monkeypatch.setenv(name, value)
            assert run("vm", "list").exit_code == 0
            monkeypatch.delenv(name)
        monkeypatch.setenv("SUBPAGE_TOKEN", "wrong" * 8)
        assert run("vm", "list", "--token-file", str(file)).exit_code == 0, "what is typed outranks the environment"
    file.write_text("two words")
    for bad, told in ((file, "must have one token"), (tmp_path / "no", "no such file"), (tmp_path, "is a folder")):
        result = run("vm", "list", "--token-file", str(bad))
        assert result.exit_code == Status.FAILED and told in result.stderr


def test_another_version_is_told_once(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from subpage import core

    monkeypatch.setattr(core, "VERSION", "9.9.9")
    service.client.get("/openapi.json")  # made when it is first asked for, which takes a while
    result = run("vm", "list", "--server", service.url)
    assert result.exit_code == 0 and result.stderr.count("this client is 9.9.9") == 1
    assert result.stderr.startswith(f"subpage: {service.url} is Subpage ")


# ---- printing


ROWS = [("vm_1", 1234567, True, "a\x1b[2Jb"), ("vm_2", 5, None, "[bold]plain[/bold]")]
NAMES = ("id", "count", "spp", "name")


def test_tables_in_a_pipe() -> None:
    out = io.StringIO()
    show.table(NAMES, ROWS, right=("count",), to=Console(file=out, width=20))
    assert out.getvalue().splitlines() == [
        "ID        COUNT  SPP  NAME",
        "vm_1  1,234,567  yes  a\\x1b[2Jb",
        "vm_2          5  -    [bold]plain[/bold]",
    ]


@pytest.mark.parametrize("width", [24, 120])
def test_tables_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for colours in (True, False):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if not colours:
            monkeypatch.setenv("NO_COLOR", "1")
        out = io.StringIO()
        show.table(NAMES, ROWS, right=("count",), to=Console(file=out, width=width, force_terminal=True))
        text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert "vm_1" in text and "1,234,567" in text and "\x1b[2J" not in text
        assert all(len(line) <= width for line in text.splitlines())
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", out.getvalue()) or colours


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal shows."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "service.cli", *arguments]
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "70", **environment}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, cwd=ROOT)
    os.close(theirs)
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    process.wait()
    return b"".join(parts).decode()


def test_a_bitmap_on_a_terminal(client: ContractClient, service: Running, vm: str) -> None:
    client.put(f"{vm}/subpages?gfn=2&npages=1", json={"access": [0xFFFFFFF0]})
    words = ("bitmap", "show", vm.rpartition("/")[2], "2", "-n", "2", "--server", service.url)
    coloured, plain = on_terminal(*words), on_terminal(*words, NO_COLOR="1")
    row = f"0x2  {'.' * 4}{'#' * 28}     4"
    assert "\x1b[1;31m" in coloured and "\x1b[32m" in coloured
    assert "31m" not in plain and row in re.sub(r"\x1b\[[0-9;]*m", "", plain)
    assert row in run(*words).stdout


def test_a_reader_that_leaves(service: Running, vm: str) -> None:
    command = [sys.executable, "-m", "service.cli", "events", vm.rpartition("/")[2], "--server", service.url]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        ended = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT, timeout=300, check=False)
    assert ended.returncode == Status.NO_READER and not ended.stderr


# ---- help

# One goes on, the other writes JSON always.
_OTHERWISE = {("serve",), ("policy", "from-symbols")}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_has_an_example_and_json(words: tuple[str, ...]) -> None:
    found = ALL[words]
    lines = examples_of(found)
    assert lines and all(" ".join(words) in line for line in lines)
    assert words in _OTHERWISE or any("--json" in param.opts for param in found.params)


@pytest.fixture
def filled(client: ContractClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Running) -> dict[str, str]:
    """A folder and a service with what the examples name; returns what stands for their ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBPAGE_SERVER", service.url)
    policy = {"name": "policy", "objects": [{"name": "modprobe_path", "gpa": "0x2080", "size": 64}]}
    Path("policy.json").write_text(json.dumps(policy))
    Path("boot.parquet").write_bytes(bodies.FORMATS["parquet"](bodies.table(gpa=[0x2080, 0x9000])).content)
    accesses = "".join(f"I  0400{at:04x},3\n S 1ffeff{at:04x},8\n" for at in range(0, 64, 8))
    Path("boot.log").write_text(f"==4242== Lackey, an example Valgrind tool\n{accesses}")
    Path("kallsyms").write_text("ffffffff81000000 T _text\nffffffff82a5c6a0 D modprobe_path\n")
    Path("ram.bin").write_bytes(b"memory")
    Path("rules.toml").write_text('answer = "skip"\n')
    for found in client.get("/v1/vms?limit=1000").json()["vms"]:
        if found["name"] in ("guest", "second"):
            client.delete(f"/v1/vms/{found['id']}")
    url = new_vm(client, name="guest")
    client.post(f"{url}/protections", json={**policy, "name": "kernel"})
    body = bodies.ndjson(bodies.table(gpa=[0x2080]))
    client.post(f"{url}/traces", content=body.content, headers=body.headers)
    body = bodies.ndjson(bodies.table(gpa=[0x2080]))
    job = client.post(f"{url}/traces", content=body.content, headers={**body.headers, "Prefer": "respond-async"})
    return {GUEST: url.rpartition("/")[2], JOB: job.json()["id"]}


def footprints() -> None:
    """Those that the examples name."""
    for name in ("boot", "user"):
        assert run("footprint", "build", "boot.parquet", "-o", f"{name}.footprint").exit_code == 0
    assert run("footprint", "build", "boot.parquet", "-o", "bytes.footprint", "--level", "bytes").exit_code == 0
    assert run("footprint", "merge", "boot.footprint", "user.footprint", "-o", "all.footprint").exit_code == 0


# Served, recorded, waited for or attached elsewhere: these go on, take minutes, or need a guest or a tool.
_ELSEWHERE = {
    *(("serve",), ("demo",), ("attach",), ("record",), ("live",)),
    *(("kvmi", "connect"), ("kvmi", "show"), ("kvmi", "disconnect")),
}


# What is done once, or under a name that nothing else has.
_ONCE = {
    *(("footprint", "build"), ("footprint", "delete"), ("vm", "delete"), ("vm", "clone")),
    *(("protect",), ("unprotect",)),
    *(("backup",), ("token", "revoke")),
}


@pytest.mark.parametrize("words", [words for words in ALL if words not in _ELSEWHERE], ids=" ".join)
def test_examples_run(words: tuple[str, ...], filled: dict[str, str], client: ContractClient) -> None:
    if words[0] == "token":
        made = run("token", "create", "x", "--json")
        filled[TOKEN_ID] = json.loads(made.stdout)["id"]
    if words in {("backup",), ("restore",)}:
        store_a_machine()
    if words == ("restore",):
        assert run("backup", "all.backup").exit_code == 0
    if words[0] == "footprint" and words != ("footprint", "build"):
        footprints()
    if words in {("footprint", "pull"), ("footprint", "delete")}:
        octets = {"Content-Type": "application/octet-stream"}
        filled[FOOTPRINT] = client.post("/v1/footprints?record=gpa8", content=bytes(8), headers=octets).json()["id"]
    for line in examples_of(ALL[words]):
        typed = shlex.split(line)[1:]
        if "--follow" in typed:
            typed.remove("--follow")
        if words == ("events",):
            typed += ["--after", "latest"]
        typed = [filled.get(word, word) for word in typed]
        result = run(*typed)
        assert result.exit_code == 0, (line, result.output)
        if any("--json" in param.opts for param in ALL[words].params) and "--json" not in typed:
            if words in _ONCE:
                continue
            again = run(*typed, "--json")
            assert again.exit_code == 0, (line, again.output)
            assert [json.loads(text) for text in _documents(again.stdout)] or words == ("events",)
    client.delete(f"/v1/vms/{filled[GUEST]}")


def store_a_machine() -> None:
    """The store that the commands look for, with a machine in it."""
    with serving(os.environ["SUBPAGE_STORE"]) as service:
        new_vm(service.client)


def _documents(text: str) -> list[str]:
    """One document, or one a line."""
    try:
        json.loads(text)
    except ValueError:
        return text.splitlines()
    return [text]


# ---- completion


def offered(shell: str, words: str, **environment: str) -> str:
    """What a shell is offered after ``words``."""
    if shell == "bash":
        given = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    else:
        given = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-c", "from service.cli.app import app; app(prog_name='subpage')"]
    variables = {**os.environ, "_SUBPAGE_COMPLETE": f"complete_{shell}", **given, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_values(shell: str, service: Running, client: ContractClient, vm: str) -> None:
    client.post(f"{vm}/protections", json={"name": "kernel", "objects": [{"name": "idt", "gpa": 0x2080, "size": 8}]})
    name = vm.rpartition("/")[2]
    server = {"SUBPAGE_SERVER": service.url}
    assert name in offered(shell, "subpage bitmap show ", **server)
    assert "kernel" in offered(shell, f"subpage unprotect {name} ", **server)
    assert "idt" in offered(shell, f"subpage exits {name} --object ", **server)
    assert "parquet" in offered(shell, "subpage trace info --format ")
    assert "violation" in offered(shell, "subpage events x --kinds ")
    assert name not in offered(shell, "subpage vm show ", SUBPAGE_SERVER="http://127.0.0.1:9")
