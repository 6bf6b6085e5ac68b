"""The main job, end to end over HTTP: create a VM, protect a policy's objects, post a trace, tell what came out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from service.platform.failures import Failure, opened

if TYPE_CHECKING:
    import httpx2

    from service.api.protection.policies import ProtectionRequest

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"  # comes with the package
DEFAULT_TRACE = DATA / "traces" / "boot.parquet"
DEFAULT_POLICY = DATA / "policies" / "kernel_control_data.json"

CONTENT_TYPES = {
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": "application/vnd.apache.arrow.stream",
    ".arrows": "application/vnd.apache.arrow.stream",
    ".ndjson": "application/x-ndjson",
    ".jsonl": "application/x-ndjson",
    ".json": "application/json",
    ".bin": "application/octet-stream",
}

_GIB = 1 << 30
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_START_SECONDS = 600  # the first start after a change compiles every kernel


class DemoError(Failure):
    """The demonstration cannot go on."""


def run_demo(
    trace: Path = DEFAULT_TRACE,
    policy: Path = DEFAULT_POLICY,
    *,
    record: str = "record16",
    memory: str | None = None,
    as_json: bool = False,
    settings: Sequence[str] = (),
) -> None:
    """Start a service, run the job, print the report, stop the service. ``settings`` are NAME=VALUE. Raises Failure."""
    if trace.suffix not in CONTENT_TYPES:
        raise DemoError(f"{trace}: the name must end in one of {', '.join(CONTENT_TYPES)}")
    size = parse_size(memory) if memory else None
    opened(policy).close()
    with opened(trace) as body, service(settings) as started:
        # Imported while the service starts, on the other core.
        import httpx2

        from service.cli.policy_files import read_policy
        from service.cli.report import print_report

        wanted = read_policy(policy)
        with httpx2.Client(base_url=started.url(), timeout=httpx2.Timeout(600.0)) as client:
            started.wait_until_ready(client)
            report = replay(client, trace, body, wanted, size, record)
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            print_report(report)


def replay(
    client: httpx2.Client, trace: Path, body: BinaryIO, policy: ProtectionRequest, memory: int | None, record: str
) -> dict[str, Any]:
    """The job itself, over HTTP; the report as plain values. ``memory`` is enough for the policy by default."""
    memory = memory or memory_for(policy)
    slot = {"slot": 0, "gpa": 0, "size": f"{memory:#x}"}
    vm = _done(client.post("/v1/vms", json={"name": f"demo {policy.name}", "memory_slots": [slot], "spp": True}))
    home = f"/v1/vms/{vm['id']}"
    document = policy.model_dump(mode="json", exclude_unset=True)
    protection = _done(client.post(f"{home}/protections", json=document))
    content_type = CONTENT_TYPES[trace.suffix]
    query = {"record": record} if trace.suffix == ".bin" else {}
    began = time.perf_counter()
    reply = client.post(
        f"{home}/traces", params=query, content=_pieces(body), headers=_body_headers(body, content_type)
    )
    result = _done(reply, trace)
    return report_of(str(trace), policy.name, memory, protection, result, time.perf_counter() - began)


def memory_for(policy: ProtectionRequest) -> int:
    """Bytes of RAM from address 0 on that are enough for a policy."""
    return max(_GIB, -(-policy.protection().end // 4096) * 4096)


def report_of(
    trace: str, policy: str, memory: int, covered: Mapping[str, Any], result: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """What ``service.cli.report`` prints: ``covered`` has the ``pages`` and ``subpages`` that are protected,
    ``result`` is the document of the trace, which took ``seconds``."""
    exits = result["violations"]
    return {
        "trace": trace,
        "policy": policy,
        "memory": memory,
        "objects": [{"name": label, **hits} for label, hits in result["by_object"].items()],
        "protected_pages": covered["pages"],
        "protected_subpages": covered["subpages"],
        "records": result["records"],
        "writes": result["writes"],
        "mmio": result["mmio"],
        "notes": result["notes"],
        "violations": exits,
        "page_granular_violations": result["page_granular_violations"],
        "factor": round(result["page_granular_violations"] / exits, 2) if exits else None,
        "exits": result["exits"],
        "seconds": round(seconds, 3),
        "writes_per_second": round(result["writes"] / seconds) if seconds else None,
        "first_exit_records": result["exit_records"][:3],
    }


def _pieces(body: Any) -> Iterator[bytes]:
    while piece := body.read(1 << 20):
        yield piece


def _body_headers(body: Any, content_type: str) -> dict[str, str]:
    return {"Content-Type": content_type, "Content-Length": str(os.fstat(body.fileno()).st_size)}


def _done(reply: httpx2.Response, file: Path | None = None) -> dict[str, Any]:
    """What the service answered; ``file`` is what it was sent."""
    document: dict[str, Any] = reply.json()
    if reply.is_error:
        who = f"{file}: " if file is not None else ""
        where = f" at record {document['index']}" if "index" in document else ""
        raise DemoError(f"{who}{document['title']}{where}: {document['detail']}")
    return document


def parse_size(text: str) -> int:
    """``4GiB``, ``512M``, ``0x1000`` in bytes, a multiple of a page."""
    found = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)\s*(?:([kmgt])(?:i?b)?)?", text.strip().lower())
    size = int(found[1], 0) * _UNITS[found[2] or ""] if found else 0
    if size == 0 or size % 4096:
        raise DemoError(f"--memory {text}: must be a size such as 1GiB, a multiple of 4096 bytes")
    return size


class Service:
    """A service process of our own on a free loopback port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._deadline = time.monotonic() + _START_SECONDS

    def url(self) -> str:
        """Where it listens; it says so in its first line. Raises DemoError if it does not start."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        found = re.search(r"http://\S+", line)
        if found is None:
            raise DemoError(f"the service did not start (exit status {self._process.poll()})")
        return found[0]

    def wait_until_ready(self, client: httpx2.Client) -> None:
        """Return when the kernels are loaded, which takes long only where they must be compiled first."""
        while time.monotonic() < self._deadline:
            if self._process.poll() is not None:
                raise DemoError(f"the service ended with status {self._process.returncode}")
            if client.get("/readyz").status_code == 200:
                return
            time.sleep(0.05)
        raise DemoError(f"the service was not ready within {_START_SECONDS} s")

    def stop(self) -> None:
        """Stop it, whatever state it is in."""
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def service(settings: Sequence[str] = ()) -> Iterator[Service]:
    """A service for the time of the context, with the kernels of the main job, under ``settings`` as NAME=VALUE.

    It does not outlive this process.
    """
    # -P: what is called `service` in the current folder is another one.
    command = [
        sys.executable,
        "-P",
        "-m",
        "service.cli.child",
        str(os.getpid()),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--store",
        "memory",
    ]
    command += [word for text in ("warm_up=first", *settings) for word in ("--set", text)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = Service(
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    )
    try:
        yield started
    finally:
        started.stop()
