"""Commands about machines of a service: the flows of the README by the command line alone, and what ends them early."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

import subpage
from service.cli import attach as attaching
from service.cli import rules
from service.cli.app import app
from service.cli.statuses import Status
from service.platform.failures import FileError
from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import bodies
from tests.support.http import access, new_vm
from tests.support.job_calls import Gate
from tests.support.server import Running, running
from tests.support.stores import serving
from tests.support.waiting import until

POLICY = {"name": "kernel", "objects": [{"name": "idt", "gpa": "0x2080", "size": 64}]}
TRACE = bodies.table(gpa=[0x2080, 0x2100, 0x9000, 0x2088])


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUBPAGE_CONFIG", "")
    for name in ("SUBPAGE_TOKEN", "SUBPAGE_TOKEN_PATH", "SUBPAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("policy.json").write_text(json.dumps(POLICY))
    Path("trace.parquet").write_bytes(bodies.FORMATS["parquet"](TRACE).content)


@pytest.fixture
def server(service: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setenv("SUBPAGE_SERVER", service.url)
    return service


def run(*arguments: str, status: int = 0) -> str:
    """Standard output, or what was said where it fails."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def document(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


@contextlib.contextmanager
def guarded() -> Iterator[Running]:
    """A service in memory that asks for a token, which is in the file ``token``."""
    record, token = mint("cli", scope="write", now=datetime.now(UTC))
    Path("token").write_text(token)
    with running(Settings(warm_up=False, store="memory"), MemoryTokens([record])) as service:
        yield service


@pytest.mark.parametrize("kind", ["memory", "sqlite", "token"])
def test_the_main_job(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = "memory" if kind == "memory" else f"sqlite:///{tmp_path}/subpage.db"
    with guarded() if kind == "token" else serving(store) as service:
        monkeypatch.setenv("SUBPAGE_SERVER", service.url)
        if kind == "token":
            assert "401" in run("vm", "list", status=Status.NOT_ALLOWED)
            monkeypatch.setenv("SUBPAGE_TOKEN_PATH", str(tmp_path / "token"))
        vm = run("vm", "create", "guest", "--memory", "16MiB").strip()
        assert vm.startswith("vm_") and "16 MiB" in run("vm", "list")
        assert "kernel: 1 sub-pages in 1 pages" in run("protect", "guest", "policy.json")
        assert "kernel (1 sub-pages)" in run("vm", "show", vm)
        assert run("policy", "show", "--vm", "guest").splitlines()[1].split()[2:4] == ["0x2080", "64"]
        assert f"0x2  #.{'#' * 30}     1" in run("bitmap", "show", vm, "2", "-n", "1")
        assert "denied: sub-page 1" in run("walk", vm, "0x2080")
        report = run("replay", "trace.parquet", "--vm", vm)
        assert "exits with sub-pages" in report and f"subpage exits {vm} tr_" in report
        (trace,) = document("traces", vm)
        assert trace["violations"] == 2 and trace["page_granular_violations"] == 3
        assert document("traces", vm, trace["id"])["by_object"]["idt"]["violations"] == 2
        lines = [json.loads(line) for line in run("exits", vm, "--json", "--object", "idt").splitlines()]
        assert [line["gpa"] for line in lines] == ["0x2080", "0x2088"]
        assert run("exits", vm, "-n", "1").count("0x20") == 1
        (job,) = document("jobs")
        assert job["state"] == "succeeded" and document("jobs", job["id"], "--wait") == job
        clone = run("vm", "clone", "guest", "--name", "second").strip()
        assert "ended kernel" in run("unprotect", "second", "kernel")
        assert run("access", clone, "0x2080").split()[:4] == ["allowed", "yes", "landed", "yes"]
        assert run("access", vm, "0x2080").split()[:4] == ["allowed", "no", "landed", "no"]
        assert "set 2 pages from 0x4 on" in run("bitmap", "set", vm, "4", "0xff", "0")
        run("bitmap", "get", vm, "4", "-n", "2", "-o", "words")
        assert Path("words").read_bytes() == bytes([0xFF, 0, 0, 0, 0, 0, 0, 0])
        assert "set 2 pages from 0x8 on" in run("bitmap", "set", vm, "8", "--from", "words")
        assert document("bitmap", "get", vm, "8", "-n", "2")["access"] == ["0x000000ff", "0x00000000"]
        assert "protection" in run("events", vm) and "change=created" in run("events", clone)
        Path("linear.ndjson").write_text('{"gva": 8320}\n')  # no tables there
        assert document("replay", "linear.ndjson", "--vm", vm, "--address", "gva")["untranslated"] == 1
        assert run("open", "--print").strip() == f"{service.url}/"
        assert run("vm", "delete", vm, "second").splitlines() == [f"deleted {vm}", f"deleted {clone}"]
        assert document("vm", "list") == []


def test_replay_on_a_machine_made_for_it(server: Running, client: ContractClient) -> None:
    typed = ("replay", "trace.parquet", "--policy", "policy.json", "--server", server.url)
    before = len(document("vm", "list"))
    found = document(*typed)
    assert found["violations"] == 2 and [one["gpa"] for one in found["exit_records"]] == ["0x2080", "0x2088"]
    assert len(document("vm", "list")) == before
    here = document(*typed[:-2])
    for name in ("records", "violations", "page_granular_violations", "by_object", "exit_records"):
        assert found[name] == here[name]
    run(*typed, "--keep")
    (kept,) = [vm for vm in document("vm", "list") if vm["name"] == "replay kernel"]
    run("vm", "delete", kept["id"])


def test_names_that_are_none_or_several(server: Running, client: ContractClient) -> None:
    assert "there is no machine called 'nobody'" in run("walk", "nobody", "1", status=Status.NOT_FOUND)
    made = [new_vm(client, name="twin") for _ in range(2)]
    assert "2 machines are called 'twin'" in run("vm", "show", "twin", status=Status.FAILED)
    for url in made:
        client.delete(url)
    assert "404" in run("jobs", "job_0", status=Status.NOT_FOUND)


def test_files_that_are_none(server: Running, vm: str) -> None:
    name = vm.rpartition("/")[2]
    Path("folder.parquet").mkdir()
    Path("empty.parquet").touch()
    os.mkfifo("pipe.parquet")
    for file, told in (("none", "no such file"), ("folder", "folder"), ("empty", "empty"), ("pipe", "is a pipe")):
        file = f"{file}.parquet"
        assert told in run("replay", file, "--vm", name, status=Status.FAILED)
    assert "no such file" in run("protect", name, "none.json", status=Status.FAILED)
    assert "trace.parquet: " in run("protect", name, "trace.parquet", status=Status.FAILED)
    Path("words").write_bytes(b"12345")
    assert "must be 4 for each page" in run("bitmap", "set", name, "1", "--from", "words", status=Status.FAILED)
    assert not server.client.get(f"{vm}/traces").json()["traces"]


def test_a_refusal_names_the_record(server: Running, vm: str) -> None:
    Path("bad.ndjson").write_text('{"gpa": 1}\n{"gpa": 2, "size": 0}\n')
    told = run("replay", "bad.ndjson", "--vm", vm.rpartition("/")[2], status=Status.FAILED)
    assert told.startswith("subpage replay: 422: record 1: ")


@pytest.mark.parametrize("moment", ["sending", "sent", "replaying"])
def test_ctrl_c_ends_the_replay(
    moment: str, server: Running, client: ContractClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the file is sent, between its end and the answer, and while the job is under way: on a real terminal."""
    gate, before = Gate(monkeypatch), len(document("vm", "list"))
    jobs_before = {job["id"] for job in document("jobs")}
    code = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    if moment != "replaying":
        code += "import subpage.bodies as b; real = b.counting; "
        code += "b.counting = lambda total, report: real(total, lambda done, of: (report(done, of), "
        code += f"done == {'0' if moment == 'sending' else 'total'} and os.kill(os.getpid(), signal.SIGINT))); "
    code += "from service.cli.app import main; main()"
    root = str(Path(__file__).parents[3])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((root, f"{root}/client")), "TERM": "xterm"}
    command = [sys.executable, "-c", code, "replay", "trace.parquet", "--policy", "policy.json", "--server", server.url]
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    said = bytearray()
    reader = threading.Thread(target=_drain, args=(ours, said))
    reader.start()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=variables) as typed:
        try:
            if moment == "replaying":
                until(lambda: bool(gate.begun))
                typed.send_signal(signal.SIGINT)
            assert typed.wait(300) == Status.INTERRUPTED
        finally:
            typed.kill()
    assert termios.tcgetattr(theirs) == settings
    os.close(theirs)
    reader.join()
    told = said.decode(errors="replace")
    assert "subpage replay: interrupted" in told and "Traceback" not in told
    assert told.count("\x1b[?25l") <= told.count("\x1b[?25h"), "the cursor is there again"
    assert len(document("vm", "list")) == before
    made = [job for job in document("jobs") if job["id"] not in jobs_before]
    assert all(job["state"] == "cancelled" for job in made), made


def _drain(terminal: int, said: bytearray) -> None:
    """What a terminal is sent until its other end is closed."""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 65536):
            said += piece
    os.close(terminal)


# ---- attach


def test_rules_answer(server: Running, client: ContractClient) -> None:
    vm = new_vm(client)
    name = vm.rpartition("/")[2]
    client.post(f"{vm}/protections", json=POLICY)
    Path("rules.toml").write_text(
        'answer = "skip"\n[[rules]]\nobject = "idt"\ngpa = ["0x2088", "0x208f"]\nanswer = "allow"\n'
    )
    command = [sys.executable, "-m", "service.cli", "attach", name, "--rules", "rules.toml", "-n", "2", "--json"]
    root = str(Path(__file__).parents[3])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((root, f"{root}/client"))}
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    until(lambda: "subpage_introspection_tools 1.0" in httpx2.get(f"{server.url}/metrics").text)
    landed = [access(client, vm, gpa=gpa, on_violation="ask")["landed"] for gpa in (0x2080, 0x2088)]
    assert landed == [False, True]
    said, _ = tool.communicate(timeout=120)
    assert [json.loads(line)["answer"] for line in said.splitlines()] == ["skip", "allow"] and tool.returncode == 0
    client.delete(vm)


def test_ctrl_c_leaves_the_machine(server: Running, vm: str) -> None:
    Path("rules.json").write_text("{}")
    # Whoever starts the tests in the background has interrupts ignored, and so would the command.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from service.cli.app import main; main()"
    command = [sys.executable, "-c", code, "attach", vm.rpartition("/")[2], "--rules", "rules.json"]
    root = str(Path(__file__).parents[3])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((root, f"{root}/client"))}
    tool = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    until(lambda: "subpage_introspection_tools 1.0" in httpx2.get(f"{server.url}/metrics").text)
    tool.send_signal(signal.SIGINT)
    _, said = tool.communicate(timeout=120)
    assert tool.returncode == 0 and "Traceback" not in said and "attached to" in said


def test_the_keyboard_answers(capsys: pytest.CaptureFixture[str]) -> None:
    exit = {
        "index": 0, "vcpu": 1, "name": "EPT violation", "gpa": "0x2080", "gfn": "0x2", "size": 8,
        "access": 1, "denied": "0x2", "objects": ["idt"],
    }  # fmt: skip
    message = {"id": "q_1", "vm": "vm_1", "trace": None, "attempt": 2, "deadline": "2026-08-22T09:30:05Z", "exit": exit}
    question = subpage.Question(message)
    typed = iter(["what", "", "G"])
    assert attaching._Console(False, lambda _: next(typed)).ask(question) == "grant"
    told = capsys.readouterr().err
    assert "write of 8 bytes at 0x2080 by vCPU 1: idt (until 09:30:05Z, asked 2 times)" in told
    assert told.count("must be one of skip, allow, grant, retry, stop, pass, or its letter") == 2
    for key, answer in attaching.KEYS.items():
        assert attaching._Console(False, lambda _, key=key: key).ask(question) == answer


def test_a_keyboard_is_needed(server: Running, vm: str) -> None:
    told = run("attach", vm.rpartition("/")[2], status=Status.FAILED)
    assert "without one, --rules names a file" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "must be an object"),
        ("{", "line 1, column 2"),
        ('{"answr": "skip"}', "answr: is no member; there are answer, rules"),
        ('{"answer": "maybe"}', "answer: must be one of skip, allow, grant, retry, stop, pass, not 'maybe'"),
        ('{"rules": {}}', "rules: must be a list"),
        ('{"rules": [7]}', "rules[0]: must be an object with an answer"),
        ('{"rules": [{}]}', "rules[0].answer: is required"),
        ('{"rules": [{"answer": "skip", "gpa": ["2", "1"]}]}', "rules[0].gpa: must be an address"),
        ('{"rules": [{"answer": "skip", "gpa": [1]}]}', "rules[0].gpa: must be an address"),
        ('{"rules": [{"answer": "skip", "gpa": true}]}', "rules[0].gpa: must be an address"),
        ('{"rules": [{"answer": "skip", "access": "w"}]}', "rules[0].access: must be one of read, write, execute"),
        ('{"rules": [{"answer": "skip", "vcpu": "0"}]}', "rules[0].vcpu: must be the id of a vCPU"),
        ('{"rules": [{"answer": "skip", "object": 1}]}', "rules[0].object: must be the name of an object"),
    ],
)
def test_rules_that_are_none(text: str, told: str) -> None:
    path = Path("rules.json")
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        rules.read_rules(path)
    assert str(caught.value).startswith("rules.json: ") and told in str(caught.value)


def test_the_first_rule_that_fits_answers() -> None:
    listed = [
        {"object": "idt", "access": "read", "answer": "allow"},
        {"gpa": 0x2080, "vcpu": 1, "answer": "stop"},
        {"gpa": ["0x2000", "0x2fff"], "answer": "grant"},
    ]
    Path("rules.json").write_text(json.dumps({"answer": "pass", "rules": listed}))
    found = rules.read_rules(Path("rules.json"))
    exit = {"objects": ["idt"], "access": 1, "vcpu": 0, "gpa": "0x2080"}
    assert found.answer(exit) == "grant" and found.answer({**exit, "access": 0}) == "allow"
    assert found.answer({**exit, "vcpu": 1}) == "stop" and found.answer({**exit, "gpa": "0x3000"}) == "pass"


def test_a_stream_that_breaks(server: Running, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[Any]:
        raise subpage.StreamBroken("the stream broke off: away")
        yield

    monkeypatch.setattr(subpage.Vm, "events", broken)
    assert "broke off" in run("events", vm.rpartition("/")[2], status=Status.NO_SERVICE)
