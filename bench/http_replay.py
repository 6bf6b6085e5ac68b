"""Method (f): a trace posted to the service, from the first byte sent to the result received."""

from __future__ import annotations

from bench.data import RAM_BYTES, Answer, Policy, Trace
from bench.servers import call, post

BODIES = {
    "packed": ("application/octet-stream", "?record=record16"),
    "arrow": ("application/vnd.apache.arrow.stream", ""),
}


class HttpReplay:
    """One body format. The machine is new each time; making it is not timed, the whole exchange is."""

    def __init__(self, port: int, kind: str, trace: Trace, policy: Policy) -> None:
        self._port, self._policy = port, policy
        self._content_type, self._query = BODIES[kind]
        self._body = trace.packed() if kind == "packed" else trace.arrow()
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
