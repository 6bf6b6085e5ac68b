"""Requests that the contract allows, and some that it does not, at a real server, for as long as one likes.

    python -m tests.contract.fuzz --minutes 20

Schemathesis takes them from the contract: each operation by itself at the edges of its schemas and at random, then
chains along the links, so that calls meet machines with a past. Every reply must be documented: its status, its media
type, its headers, its body; none may be a 5xx but for what is documented; and no route may forget to ask for a token.

One of its checks is left out: ``positive_data_acceptance`` wants every request accepted that its schema allows, and
whether a GFN lies in a memory slot is not in a schema.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("schemathesis.toml")
TOKEN = "sp_fuzz_" + "0" * 43
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
    "what_links_lead_to_is_there",
)
# So many machines as random chains leave behind, and nothing in one that takes long or much memory.
SETTINGS = {
    "STORE": "memory",
    "TOKEN": TOKEN,
    "MAX_VMS": "20000",
    "MAX_TABLE_FRAMES": "4096",
    "MAX_SUBPAGE_WINDOW": "4096",
    "MAX_MEMORY_WINDOW": str(1 << 20),
    "MAX_DOCUMENT_BYTES": str(1 << 20),
    "MAX_BODY_BYTES": str(1 << 20),
    "MAX_EXIT_RECORDS": "10000",
    "LOG_LEVEL": "error",
    "AUDIT_LOG": os.devnull,
}


@contextmanager
def server(log: list[str]) -> Iterator[str]:
    """The URL of a server of its own process, with tokens. ``log`` grows with what it complains of."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SUBPAGE_")}
    environment |= {f"SUBPAGE_{name}": value for name, value in SETTINGS.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", "from service.cli.app import main; main()", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    errors = process.stderr
    listener = threading.Thread(target=lambda: log.extend(line.rstrip() for line in errors), daemon=True)
    listener.start()
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, log
        yield found[0]
        assert process.poll() is None, f"the server is gone: {log[-20:]}"
    finally:
        process.terminate()
        process.wait()
        listener.join()
        process.stdout.close()
        process.stderr.close()


def run(
    url: str, folder: Path, phases: str, *, seed: int | None, output: Any, options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fuzz ``url``, for as long as ``options`` say; the report that Schemathesis wrote."""
    report = folder / "report.json"
    command = [
        *(sys.executable, "-W", "ignore", "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{url}/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}"),
        *("--phases", phases, "--checks", ",".join(CHECKS)),
        *("--continue-on-failure", "--request-timeout", "60", "--generation-database", "none", "--no-color"),
        *("--suppress-health-check", "all", "--warnings", "off", "--wait-for-schema", "120"),
        *("--report", "json", "--report-json-path", str(report)),
        *(("--seed", str(seed)) if seed is not None else ()),
        *options,
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.contract.fuzz_hooks", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env={**os.environ, **hooks}, cwd=folder, stdout=output, stderr=output, check=False)
    written: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return written


def succeeded(url: str) -> tuple[set[str], int]:
    """The routes with a success, and the number of successes, as the server counts them."""
    # It counts what thousands of machines have that the chains left behind.
    with httpx2.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=300.0) as client:
        text = client.get(f"{url}/metrics").text
    counted = re.findall(
        r'^subpage_request_seconds_count{method="(\w+)",route="([^"]+)",status="2\d\d"} (\S+)$', text, re.MULTILINE
    )
    return {f"{method} {route}" for method, route, _ in counted}, sum(int(float(count)) for _, _, count in counted)


def summary(
    report: dict[str, Any], log: list[str], routes: set[str], successes: int, *, whole: bool = True
) -> tuple[str, bool]:
    """The figures in a line, and whether nothing was found; a ``whole`` run has tried every operation."""
    cases, operations = report["test_cases"], report["operations"]
    failures = sum(failure["count"] for failure in report["failures"])
    errors = sum(error["count"] for error in report["errors"])
    line = (
        f"cases: {cases['generated']}, operations: {operations['tested']} of {operations['total']}, "
        f"{len(routes)} of them with a success, {successes} successes, "
        f"failures: {failures}, errors: {errors}, lines logged by the server: {len(log)}"
    )
    tried = cases["generated"] > 0 and (not whole or operations["tested"] == operations["total"])
    return line, tried and not failures and not errors and not log


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long; 20 unless given")
    parser.add_argument("--seed", type=int, help="the same requests again, as far as the clock lets them")
    parser.add_argument("--phases", default="coverage,fuzzing,stateful", help="of Schemathesis")
    options, further = parser.parse_known_args()
    log: list[str] = []
    with tempfile.TemporaryDirectory() as folder, server(log) as url:
        limits = ("--max-time", str(round(options.minutes * 60)), *further)
        report = run(url, Path(folder), options.phases, seed=options.seed, output=None, options=limits)
        routes, successes = succeeded(url)
    for line in log[-100:]:
        sys.stdout.write(f"server: {line}\n")
    line, clean = summary(report, log, routes, successes)
    sys.stdout.write(f"{line}\n")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
