"""Method (k): what the Python client adds to the HTTP calls that it makes, beside the same calls by httpx2 alone."""

from __future__ import annotations

import httpx2

import subpage
from bench.data import RAM_BYTES, Policy
from service.cli.demo import DEFAULT_TRACE

CALLS = 500  # of a round
_OCTETS = {"Accept": "application/octet-stream"}
_PARQUET = {"Content-Type": "application/vnd.apache.parquet"}


class Machine:
    """One machine, as both see it; made anew before each replay, which is not timed."""

    def __init__(self, url: str, policy: Policy) -> None:
        self.client = subpage.Client(url)
        self.http = httpx2.Client(base_url=url, timeout=600)
        self._policy = policy
        self.vm: subpage.Vm | None = None

    def prepare(self) -> None:
        if self.vm is not None:
            self.vm.delete()
        self.vm = self.client.create_vm("bench", memory=RAM_BYTES)
        self.vm.protect(self._policy.objects, name=self._policy.name)

    def close(self) -> None:
        if self.vm is not None:
            self.vm.delete()
        self.http.close()
        self.client.close()


class RawBitmaps(Machine):
    """GET of one page's bitmap, one after the other."""

    def run(self) -> None:
        assert self.vm is not None
        path, query = f"/v1/vms/{self.vm.id}/subpages", {"gfn": 0x2000, "npages": 1}
        for _ in range(CALLS):
            assert len(self.http.get(path, params=query, headers=_OCTETS).raise_for_status().content) == 4


class ClientBitmaps(Machine):
    """The same, as ``vm.subpages``."""

    def run(self) -> None:
        assert self.vm is not None
        for _ in range(CALLS):
            assert len(self.vm.subpages(0x2000)) == 1


class RawReplay(Machine):
    """The recorded boot as Parquet, from the first byte sent to the result."""

    violations = -1

    def run(self) -> None:
        assert self.vm is not None
        with DEFAULT_TRACE.open("rb") as file:
            size = {"Content-Length": str(DEFAULT_TRACE.stat().st_size)}
            pieces = iter(lambda: file.read(1 << 18), b"")
            reply = self.http.post(f"/v1/vms/{self.vm.id}/traces", content=pieces, headers=_PARQUET | size)
        self.violations = reply.raise_for_status().json()["violations"]


class ClientReplay(RawReplay):
    """The same, as ``vm.replay``."""

    def run(self) -> None:
        assert self.vm is not None
        self.violations = self.vm.replay(DEFAULT_TRACE).violations
