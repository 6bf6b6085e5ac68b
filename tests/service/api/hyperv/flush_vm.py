"""State S0 of the printed flush vectors over HTTP: five VPs whose accesses left the same eight translations, A to H."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.contract.client import ContractClient
from tests.engine.hyperv.flush_machine import ALL, ENTRIES, INPUT, VP_INDICES, words
from tests.engine.hyperv.guests import CPUID, CR4, GUEST_OS_ID, OS_ID
from tests.support.guests import leaves
from tests.support.http import OCTETS

BY_PLACE = {(space, linear): name for name, (space, linear, _, _) in ENTRIES.items()}
_TABLE = 0x67
_GLOBAL, _LARGE = 1 << 8, 1 << 7
_PCIDE = 1 << 17
# Below the tables that CR3 names; what the pages are does not matter: they begin at GPA 0.
_FIRST_TABLE = 0x10000


class FlushVm:
    """A VM in state S0; ``fill`` brings it back to it."""

    def __init__(self, client: ContractClient, make_vm: Callable[..., str], **config: Any) -> None:
        self.client = client
        self.policy = config.get("flush_policy", "kvm")
        vcpus = [{"id": at, "vp_index": index, "cpuid": leaves(CPUID)} for at, index in enumerate(VP_INDICES)]
        self.url = make_vm(spp=False, vcpus=vcpus, translation_cache="model", **config)
        self.put("vcpus/0/msrs", msrs=[{"index": hex(GUEST_OS_ID), "value": hex(OS_ID)}])
        self._next_table = _FIRST_TABLE
        self._tables: dict[tuple[int, int, int], int] = {}
        for entry in ENTRIES.values():
            self.map_page(*entry)
        for vcpu in range(len(VP_INDICES)):
            self.put(f"vcpus/{vcpu}/vmcs", cr4=hex(CR4 | _PCIDE))

    def put(self, path: str, **body: Any) -> Any:
        reply = self.client.put(f"{self.url}/{path}", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def store(self, gpa: int, data: bytes) -> bool:
        """Whether there is memory for it."""
        reply = self.client.put(f"{self.url}/memory", params={"gpa": hex(gpa)}, content=data, headers=OCTETS)
        assert reply.status_code in (204, 422), reply.text
        return reply.status_code == 204

    def map_page(self, space: int, linear: int, bits: int, is_global: bool) -> None:
        table = space
        for shift in range(39, bits, -9):
            index = linear >> shift & 511
            below = self._tables.get((table, shift, index))
            if below is None:
                below = self._tables[table, shift, index] = self._next_table
                self._next_table += 0x1000
                assert self.store(table + 8 * index, words(below | _TABLE))
            table = below
        leaf = _TABLE | (_GLOBAL if is_global else 0) | (_LARGE if bits > 12 else 0)
        assert self.store(table + 8 * (linear >> bits & 511), words(leaf))

    def held(self, vcpu: int) -> str:
        """Names of the translations that a vCPU's cache has."""
        entries = self.client.get(f"{self.url}/vcpus/{vcpu}/tlb").json()["entries"]
        return named(entry for entry in entries if entry["kind"] == "combined")

    def fill(self) -> None:
        """Let every VP read through what it does not remember, each address space in a PCID of its own."""
        for vcpu in range(len(VP_INDICES)):
            held = self.held(vcpu)
            for space in (0x1000, 0x2000):
                missing = [name for name in ALL if ENTRIES[name][0] == space and name not in held]
                if missing:
                    self.put(f"vcpus/{vcpu}/vmcs", cr3=hex(space | space >> 12))
                for name in missing:
                    body = {"gva": hex(ENTRIES[name][1]), "size": 8, "access": "read", "vcpu": vcpu}
                    assert self.client.post(f"{self.url}/accesses", json=body).json()["allowed"]
            if held != ALL:
                assert self.held(vcpu) == ALL

    def call(self, control: int, text: str) -> Any:
        """A hypercall of VP 0 with its input as the vectors print it."""
        if "RDX=" in text:
            given = dict(item.split("=") for item in text.split())
            xmm = [given.get(f"XMM{at}", "0" * 32) for at in range(6)]
            registers = {"rcx": hex(control), "rdx": given["RDX"], "r8": given["R8"], "xmm": xmm}
        else:
            gpa = INPUT
            if text.startswith("@"):
                where, text = text.split(":")
                gpa = int(where[1:], 16)
            self.store(gpa, bytes.fromhex(text))
            registers = {"rcx": hex(control), "rdx": hex(gpa)}
        return self.post({"registers": registers})

    def post(self, body: dict[str, Any]) -> Any:
        """A hypercall of VP 0."""
        reply = self.client.post(f"{self.url}/vcpus/0/hypercalls", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


def named(entries: Any) -> str:
    """The entries of ENTRIES that those of a reply are."""
    return "".join(sorted(BY_PLACE[int(entry["address_space"], 16), int(entry["address"], 16)] for entry in entries))
