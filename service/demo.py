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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

ROOT = Path(__file__).parent.parent
DEFAULT_TRACE = ROOT / "tests" / "data" / "traces" / "boot.parquet"
DEFAULT_POLICY = ROOT / "tests" / "data" / "policies" / "kernel_control_data.json"

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


class DemoError(Exception):
    """Something the user can act on."""


@dataclass(frozen=True)
class Policy:
    """Named byte ranges of guest memory to protect."""

    name: str
    objects: list[dict[str, Any]]

    @property
    def end(self) -> int:
        """The first address after every object."""
        return max(_number(item["gpa"]) + _number(item["size"]) for item in self.objects)


def run_demo(trace: Path | None, policy: Path | None, *, record: str, memory: str | None, as_json: bool) -> None:
    """Start a service, run the job, print the report, stop the service. Raises DemoError."""
    trace_path = _existing(trace, DEFAULT_TRACE, "--trace")
    wanted = read_policy(_existing(policy, DEFAULT_POLICY, "--policy"))
    if trace_path.suffix not in CONTENT_TYPES:
        raise DemoError(f"{trace_path}: the name must end in one of {', '.join(CONTENT_TYPES)}")
    size = parse_size(memory) if memory else max(_GIB, -(-wanted.end // 4096) * 4096)
    with service() as started:
        # Imported while the service starts, on the other core.
        import httpx2  # noqa: PLC0415

        from service.report import print_report  # noqa: PLC0415

        with httpx2.Client(base_url=started.url(), timeout=httpx2.Timeout(600.0)) as client:
            started.wait_until_ready(client)
            report = replay(client, trace_path, wanted, size, record)
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            print_report(report)


def read_policy(path: Path) -> Policy:
    """The policy in a JSON file; members that the service has no use for are left out."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        objects = [{name: item[name] for name in ("name", "gpa", "size")} for item in document["objects"]]
        policy = Policy(str(document.get("name") or path.stem), objects)
        if not objects or policy.end < 1:
            raise ValueError("it has no objects")
    except (OSError, ValueError, TypeError, LookupError) as error:
        message = f'must be JSON like {{"name", "objects": [{{"name", "gpa", "size"}}]}}: {error!r}'
        raise DemoError(f"{path}: {message}") from None
    return policy


def replay(client: httpx2.Client, trace: Path, policy: Policy, memory: int, record: str) -> dict[str, Any]:
    """The job itself, over HTTP; the report as plain values."""
    slot = {"slot": 0, "gpa": 0, "size": f"{memory:#x}"}
    vm = _done(client.post("/v1/vms", json={"name": f"demo {policy.name}", "memory_slots": [slot], "spp": True}))
    home = f"/v1/vms/{vm['id']}"
    name = re.sub(r"[^A-Za-z0-9_.~-]", "_", policy.name)[:128]
    protection = _done(client.post(f"{home}/protections", json={"name": name, "objects": policy.objects}))
    content_type = CONTENT_TYPES[trace.suffix]
    query = {"record": record} if trace.suffix == ".bin" else {}
    began = time.perf_counter()
    with trace.open("rb") as body:
        reply = client.post(
            f"{home}/traces", params=query, content=_pieces(body), headers=_body_headers(body, content_type)
        )
    result = _done(reply)
    return report_of(str(trace), policy.name, memory, protection, result, time.perf_counter() - began)


def report_of(
    trace: str, policy: str, memory: int, covered: Mapping[str, Any], result: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """What ``service.report`` prints: ``covered`` has the ``pages`` and ``subpages`` that are protected, ``result`` is
    the document of the trace, which took ``seconds``."""
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


def _done(reply: httpx2.Response) -> dict[str, Any]:
    document: dict[str, Any] = reply.json()
    if reply.is_error:
        where = f" at record {document['index']}" if "index" in document else ""
        raise DemoError(f"{document['title']}{where}: {document['detail']}")
    return document


def _existing(given: Path | None, default: Path, option: str) -> Path:
    path = given or default
    if path.is_file():
        return path
    if given is not None:
        raise DemoError(f"{path}: no such file")
    raise DemoError(
        f"the committed data is not there ({path}): run from a clone of the repository, or give {option} FILE"
    )


def _number(value: int | str) -> int:
    return value if isinstance(value, int) else int(value, 0)


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
def service() -> Iterator[Service]:
    """A service for the time of the context, with the kernels that the main job needs."""
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "--set",
        "warm_up=first",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--store",
        "memory",
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = Service(
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    )
    try:
        yield started
    finally:
        started.stop()
