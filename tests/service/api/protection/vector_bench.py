"""The bench of the printed vectors behind HTTP: what ``tests.engine.cpu.vectors`` needs of a processor, call by call.

Tables are frames made with ``table-frames``. An entry of any of them is written through a window: the hypervisor's own
tables are given one page table whose PTEs are the entries of the frame; EPTP names those tables while the bench is set
up, and the tables of the vectors while something runs. No memory slot holds the test pages, so that KVM leaves every
exit about them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch.vmcs_fields import FIELDS
from engine.cpu.instruction import Access
from engine.state.default_host import EPT_VPID_CAP
from tests.contract.client import ContractClient
from tests.engine.cpu.bench_machine import (
    GUEST_PD,
    GUEST_PDPT,
    GUEST_PML4,
    GUEST_PT,
    GUEST_TABLE,
    LEAF,
    LINEAR,
    PAGE,
    TABLE,
)

FIELD_OF = {int(field.word): name for name, field in FIELDS.items()}
EXCEPTIONS = {"#GP": -13, "#PF": -14, "#VE": -20}
EPT_TABLES = ("root", "PDPT", "PD", "PT", "gPT", "gUpper", "FPDPT", "FPD", "FPT", "VEB", "PMLB")
SPPT_TABLES = ("L4", "L3", "L2", "L1", "gL1", "FL3", "FL2", "FL1")


class HttpProcessor:
    """One vCPU of a VM of its own, set up as ``bench_machine.Processor`` is."""

    def __init__(
        self,
        client: ContractClient,
        make_vm: Callable[..., str],
        *,
        width: int = 40,
        levels: int = 4,
        cap: int = EPT_VPID_CAP,
        model: bool = False,
    ) -> None:
        self.client = client
        self.vm = make_vm(
            maxphyaddr=width,
            memory_slots=[{"slot": 0, "gpa": GUEST_PT, "size": 0x30_0000}],
            translation_cache="model" if model else "off",
            host={"vmx_capabilities": {"ept_vpid_cap": hex(cap), "procbased_ctls3": "0xc"}},
        )
        self.words = {name: int(word, 16) for name, word in client.get(f"{self.vm}/vcpus/0/vmcs").json().items()}
        self.kvm_eptp = self.entered = self.words["eptp"]
        self.shown = 0
        kvm_levels = (self.kvm_eptp >> 3 & 7) + 1
        for level in range(kvm_levels, 2, -1):
            self._put(f"ept/{level}/0x0", {"raw": hex(self.table() | 7)})
        self.tables = {name: self.table() for name in (*EPT_TABLES, *SPPT_TABLES)}
        self.tables["PML4"] = self.table() if levels == 5 else self.tables["root"]
        self._fill(levels)
        self.vcpu(
            {
                ctl.V_EPTP: self.tables["root"] | 6 | levels - 1 << 3,
                ctl.V_SPPTP: self.tables["L4"],
                ctl.V_SECONDARY: ctl.SECONDARY_EPT | ctl.SECONDARY_SPP,
                ctl.V_PML_ADDRESS: self.tables["PMLB"],
                ctl.V_PML_INDEX: 511,
                ctl.V_VE_ADDRESS: self.tables["VEB"],
                ctl.V_CR0: 0x8001_0033,
                ctl.V_CR3: GUEST_PML4,
                ctl.V_CR4: 0x2620,
                ctl.V_EFER: 0xD00,
            }
        )

    def _fill(self, levels: int) -> None:
        t = self.tables
        if levels == 5:
            self.poke(t["root"], t["PML4"] | TABLE)
        links = [("PML4", 0, "PDPT"), ("PML4", 1, "FPDPT"), ("PDPT", 0, "PD"), ("FPDPT", 0, "FPD"), ("FPD", 4, "FPT")]
        links += [("PD", 4, "PT"), ("PD", 5, "gPT"), ("PD", 6, "gUpper")]
        for table, index, below in links:
            self.poke(t[table] + 8 * index, t[below] | TABLE)
        for table, base, pages in (("PT", 0x800000, (1, 2)), ("FPT", 0x800000, (1,)), ("gPT", GUEST_PT, (0, 1))):
            for page in pages:
                self.poke(t[table] + 8 * page, base + page * PAGE | LEAF)
        for page in range(3):
            self.poke(t["gUpper"] + 8 * page, GUEST_PD + page * PAGE | LEAF)
        for four, three, two, one in ((0, "L3", "L2", "L1"), (1, "FL3", "FL2", "FL1")):
            self.poke(t["L4"] + 8 * four, t[three] | 1)
            self.poke(t[three], t[two] | 1)
            self.poke(t[two] + 8 * 4, t[one] | 1)
        self.guest(GUEST_PML4, GUEST_PDPT | GUEST_TABLE)
        self.guest(GUEST_PDPT, GUEST_PD | GUEST_TABLE)
        self.guest(GUEST_PD + 8 * 4, GUEST_PT | GUEST_TABLE)
        self.guest(GUEST_PD + 8 * 5, GUEST_PT + PAGE | GUEST_TABLE)
        for page in range(1, 3):
            self.guest(GUEST_PT + 8 * page, LINEAR - PAGE + page * PAGE | GUEST_TABLE)
        self.guest(GUEST_PT + PAGE, GUEST_PT | GUEST_TABLE)

    # ---- words

    def _put(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        reply = self.client.put(f"{self.vm}/{path}", json=document)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def _post(self, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        reply = self.client.post(f"{self.vm}/{path}", **({} if document is None else {"json": document}))
        assert reply.status_code in (200, 201), reply.text
        found: dict[str, Any] = reply.json()
        return found

    def table(self) -> int:
        return int(self._post("table-frames")["address"], 16)

    def _enter_with(self, eptp: int) -> None:
        if self.entered != eptp:
            self._put("vcpus/0/vmcs", {"eptp": hex(eptp)})
            self.entered = eptp

    def _window(self, address: int) -> str:
        """Path of the entry at an address."""
        self._enter_with(self.kvm_eptp)
        table = address & -PAGE
        if self.shown != table:
            self._put("ept/2/0x0", {"raw": hex(table | 7)})
            self.shown = table
        return f"ept/1/{address % PAGE // 8 << 12:#x}"

    def poke(self, address: int, value: int) -> None:
        path = self._window(address)
        assert self._put(path, {"raw": hex(value)})["raw"] == hex(value)

    def peek(self, address: int) -> int:
        return int(self.client.get(f"{self.vm}/{self._window(address)}").json()["raw"], 16)

    def vcpu(self, words: dict[Any, int]) -> None:
        fields = {FIELD_OF[int(word)]: value for word, value in words.items()}
        self.words |= fields
        rest = {name: hex(value) for name, value in fields.items() if name != "eptp"}
        if rest:
            self._put("vcpus/0/vmcs", rest)

    def control(self, word: Any) -> int:
        name = FIELD_OF[int(word)]
        if name == "eptp":
            return self.words[name]
        return int(self.client.get(f"{self.vm}/vcpus/0/vmcs").json()[name], 16)

    def turn_on(self, word: Any, mask: int) -> None:
        self.vcpu({word: self.control(word) | mask})

    def guest(self, gpa: int, value: int) -> None:
        reply = self.client.put(
            f"{self.vm}/memory?gpa={gpa:#x}",
            content=value.to_bytes(8, "little"),
            headers={"Content-Type": "application/octet-stream"},
        )
        assert reply.status_code in (200, 204), reply.text

    def guest_word(self, gpa: int) -> int:
        return int.from_bytes(self.client.get(f"{self.vm}/memory?gpa={gpa:#x}&size=8").content, "little")

    def leaf(self, far: bool = False) -> int:
        return self.tables["FPT" if far else "PT"] + 8

    # ---- what it does

    def enter(self) -> int:
        self._enter_with(self.words["eptp"])
        reply = self._post("vcpus/0/vm-entry")
        assert reply["result"] == ("VMsucceed" if reply["vm_instruction_error"] is None else "VMfail")
        return reply["vm_instruction_error"] or 0

    def invept(self) -> None:
        assert self._post("vcpus/0/invept", {"type": 2})["result"] == "VMsucceed"

    def access(
        self, access: int, size: int = 8, linear: int = LINEAR, *, kind: int = acc.DATA, circumstances: int = 0
    ) -> Access:
        """One access by linear address; of several exits, the first."""
        self._enter_with(self.words["eptp"])
        found = self._post(
            "accesses",
            {
                "gva": hex(linear),
                "size": size,
                "access": access,
                "kind": kind,
                "circumstances": circumstances >> acc.CIRCUMSTANCE_SHIFT,
            },
        )
        exits = [item for item in found["exits"] if item["resolution"] != "exception"]
        if exits:
            first = exits[0]
            numbers = (int(first[name], 16) for name in ("qualification", "gpa", "gva"))
            return Access(first["reason"], *numbers, 0, int(first["denied"], 16), first["stale"])
        if found["exception"] is not None:
            reason, address = EXCEPTIONS[found["exception"]], int(found["fault_address"], 16)
            if reason == EXCEPTIONS["#VE"]:
                qualification = self.peek(self.words["ve_information_address"] + 8)
                return Access(reason, qualification, int(found["gpa"], 16), address, 0, 0, found["stale"])
            return Access(reason, 0, 0, address, found["error_code"], 0, found["stale"])
        assert found["allowed"], found
        return Access(0, 0, int(found["gpa"], 16), linear, 0, 0, found["stale"])

    def walk(self, access: int, size: int, gpa: int, kind: int, circumstances: int) -> tuple[int, int, int]:
        """(reason, qualification, GPA) that ``walk`` explains for a supervisor page that is writable."""
        self._enter_with(self.words["eptp"])
        query = f"gpa={gpa:#x}&access={access}&size={size}&kind={kind}&linear=5"
        query += f"&circumstances={circumstances >> acc.CIRCUMSTANCE_SHIFT}"
        told = self.client.get(f"{self.vm}/walk?{query}").json()
        assert told["sentence"]
        if told["reason"] is None:
            return 0, 0, gpa
        return told["reason"], int(told["qualification"], 16), int(told["exit_gpa"], 16)
