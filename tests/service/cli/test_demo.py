"""The demonstration, and the command line around it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service import __version__
from service.cli import app, demo, report
from service.cli.policy_files import read_policy
from tests.contract.client import ContractClient
from tests.support import bodies, recorded
from tests.support.bodies import FORMATS, table

ROOT = Path(__file__).parents[3]
OBJECTS = [{"name": "hit", "gva": "0x0", "gpa": "0x2080", "size": 64}, {"name": "missed", "gpa": 8192, "size": 64}]
TRACE = table(gpa=[0x1000, 0x2080, 0x20C0, 0x2100, 0xFEE00000], size=[8, 8, 8, 8, 4])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"name": "two_objects", "about": "x", "objects": OBJECTS}), encoding="utf-8")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def replayed(client: ContractClient, trace: Path, policy: Path, memory: int | None) -> dict[str, Any]:
    with trace.open("rb") as body:
        return demo.replay(client, trace, body, read_policy(policy), memory, "record16")


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_file(client: ContractClient, policy: Path, write: Callable[[str], Path], name: str) -> None:
    found = replayed(client, write(name), policy, 1 << 20)
    assert found["policy"] == "two_objects" and found["records"] == 5 and found["mmio"] == 1
    assert found["violations"] == 2 and found["page_granular_violations"] == 3 and found["factor"] == 1.5
    assert found["objects"] == [
        {"name": "hit", "violations": 2, "collateral": 1, "first_index": 1, "subpages": 1},
        {"name": "missed", "violations": 0, "collateral": 0, "first_index": None, "subpages": 1},
    ]
    assert found["writes_per_second"] > 0 and found["protected_subpages"] == 2


def test_the_report_reads_well(client: ContractClient, policy: Path, write: Callable[[str], Path]) -> None:
    console = Console(record=True, width=120)
    report.print_report(replayed(client, write("arrow"), policy, None), console)
    text = console.export_text()
    assert re.search(r"hit\W+1\W+2\W+1\W+1\b", text) and re.search(r"missed\W+1\W+0\W+0\W+–", text)
    assert re.search(r"exits with sub-pages\s+2\b", text) and "1.5 times as many" in text
    assert "M writes/s" in text and "Where to look next" in text and "guest RAM 1 GiB" in text


def test_no_violation_no_factor(client: ContractClient, policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "quiet.arrow"
    path.write_bytes(bodies.arrow(TRACE[:1]).content)
    found = replayed(client, path, policy, 1 << 20)
    assert found["factor"] is None
    report.print_report(found, Console(record=True))


def test_a_refusal_is_told(client: ContractClient, policy: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.arrow"
    path.write_bytes(bodies.arrow(TRACE.set_column(1, "size", pa.array([8, 0, 8, 8, 8], pa.uint16()))).content)
    with pytest.raises(demo.DemoError, match=r"bad\.arrow: Invalid trace at record 1: size"):
        replayed(client, path, policy, 1 << 20)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("512m", 1 << 29), ("0x2000", 8192), ("4096", 4096), ("2 T", 2 << 40), ("64kb", 65536)],
)
def test_sizes(text: str, size: int) -> None:
    assert demo.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "1", "x", "1.5GiB", "-4096", "4097"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(demo.DemoError):
        demo.parse_size(text)


def test_from_start_to_end(policy: Path, write: Callable[[str], Path]) -> None:
    result = run("demo", "--json", "--trace", str(write("parquet")), "--policy", str(policy), "--memory", "1MiB")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["violations"] == 2 and found["memory"] == 1 << 20


def started(code: str) -> demo.Service:
    return demo.Service(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))


def test_a_service_that_does_not_start(client: ContractClient) -> None:
    service = started("raise SystemExit(7)")
    with pytest.raises(demo.DemoError, match="did not start"):
        service.url()
    service.stop()
    service = started(f"print('on {client.base_url}')")
    assert service.url() == str(client.base_url)
    service._process.wait(30)
    with httpx2.Client() as none, pytest.raises(demo.DemoError, match="ended with status 0"):
        service.wait_until_ready(none)
    service.stop()


def test_a_service_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_START_SECONDS", 0.5)
    service = started("import time; time.sleep(60)")
    transport = httpx2.MockTransport(lambda request: httpx2.Response(503))
    with (
        httpx2.Client(base_url="http://t", transport=transport) as client,
        pytest.raises(demo.DemoError, match="ready"),
    ):
        service.wait_until_ready(client)
    service.stop()


@pytest.mark.jit
def test_the_real_thing() -> None:
    truth = json.loads(recorded.TRUTH.read_text(encoding="utf-8"))
    truth = truth["kernel_control_data"]["boot.parquet"]
    result = run("demo")
    assert result.returncode == 0, result.stderr
    assert f"{truth['violations']:,}" in result.stdout and f"{truth['page_granular_violations']:,}" in result.stdout
    for label, hits in truth["by_object"].items():
        found = re.search(rf"{label}\W+(\d+)\W+([\d,]+)\W+([\d,]+)\W+([\d,]+|–)", result.stdout)
        assert found and [int(found[n].replace(",", "")) for n in (2, 3)] == [hits["violations"], hits["collateral"]]


def test_it_never_reads_the_answers() -> None:
    for source in (demo, report, app):
        assert "ground" not in Path(str(source.__file__)).read_text(encoding="utf-8").lower()


def test_version_is_quick() -> None:
    result = run("--version")
    assert result.stdout == f"subpage {__version__}\n"
    code = "import sys, service.cli; print(*(m for m in ('fastapi', 'numba', 'pyarrow', 'numpy') if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_help_and_mistakes() -> None:
    runner = CliRunner()
    assert "serve" in runner.invoke(app.app, ["--help"]).output
    assert runner.invoke(app.app, ["serve", "--port", "70000"]).exit_code == 2
    assert "SUBPAGE_PORT" in runner.invoke(app.app, ["serve", "--port", "70000"]).output


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_and_stops_when_told(stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    environment = {**os.environ, "SUBPAGE_WARM_UP": "false"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        found = re.fullmatch(r"subpage is listening on (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
        assert found is not None
        reply = httpx2.get(f"{found[1]}/readyz")
        assert reply.status_code == 200 and "server" not in reply.headers
        process.send_signal(stop)
        assert process.wait(30) == 0
        assert process.stdout.read() == "" and process.stderr.read() == ""
