"""Method (f): a trace posted to the service, from the first byte sent to the result received."""

from __future__ import annotations

import pyarrow as pa

import subpage
from bench.data import RAM_BYTES, Answer, Policy, Trace
from bench.servers import call, post
from tests.support import recorded

ARROW = "application/vnd.apache.arrow.stream"
CONTENT_TYPES = {
    "packed": "application/octet-stream",
    "arrow": ARROW,
    "parquet": "application/vnd.apache.parquet",
    "compact": ARROW,
}
QUERIES = {"packed": "?record=record16"}


def body_of(kind: str, trace: Trace) -> bytes:
    """A trace as it is posted: packed records, columns side by side, the recorded file with all that it has, or the
    columns as ``subpage.compact`` makes them."""
    if kind == "packed":
        return trace.packed()
    if kind == "arrow":
        return trace.arrow()
    if kind == "parquet":
        return recorded.trace(trace.name).read_bytes()
    return b"".join(subpage.compact(pa.table({"gpa": trace.gpa, "size": trace.size})))


class HttpReplay:
    """One body format. The machine is new each time; making it is not timed, the whole exchange is."""

    def __init__(self, port: int, kind: str, trace: Trace, policy: Policy) -> None:
        self._port, self._policy = port, policy
        self._content_type, self._query = CONTENT_TYPES[kind], QUERIES.get(kind, "")
        self._body = body_of(kind, trace)
        self.bytes_record = len(self._body) / max(1, len(trace))
        self.path: str | None = None  # of the machine
        self._answer = Answer(-1)

    def prepare(self) -> None:
        self.close()
        slot = {"slot": 0, "gpa": 0, "size": RAM_BYTES}
        vm = post(self._port, "/v1/vms", {"name": "bench", "memory_slots": [slot], "spp": True})
        self.path = f"/v1/vms/{vm['id']}"
        post(self._port, f"{self.path}/protections", {"name": self._policy.name, "objects": self._policy.objects})

    def run(self) -> None:
        path = f"{self.path}/traces{self._query}"
        result = call(self._port, "POST", path, self._body, self._content_type)[1]
        self._answer = Answer(result["violations"], result["page_granular_violations"])

    def answer(self) -> Answer:
        return self._answer

    def close(self) -> None:
        if self.path is not None:
            call(self._port, "DELETE", self.path)
            self.path = None
