"""The little language of the printed vectors: what a row sets up, the access it makes, what it expects.

``PTE=0x35|b61; vec=1``, ``write 8 +0x7C``, ``48 q=0x1AA``: the rows are the printed ones, and this reads them. A setup
applies to a ``Processor``; an expectation is a set of outcomes of which one must happen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept
from engine.cpu.instruction import Access

from . import bench_machine as bench
from .bench_machine import ALL, B61, FAR, GUEST_PD, GUEST_PDPT, GUEST_PML4, GUEST_PT, LINEAR

GUEST_PTE = GUEST_PT + 8


class Bench(Protocol):
    """What a row needs of a processor: see ``bench_machine.Processor``; ``tests/service`` has one behind HTTP."""

    tables: dict[str, int]

    def vcpu(self, words: dict[Any, int]) -> None: ...
    def control(self, word: Any) -> int: ...
    def turn_on(self, word: Any, mask: int) -> None: ...
    def poke(self, address: int, value: int) -> None: ...
    def peek(self, address: int) -> int: ...
    def guest(self, gpa: int, value: int) -> None: ...
    def guest_word(self, gpa: int) -> int: ...
    def leaf(self, far: bool = False) -> int: ...
    def enter(self) -> int: ...
    def invept(self) -> None: ...
    def access(
        self, access: int, size: int = 8, linear: int = LINEAR, *, kind: int = acc.DATA, circumstances: int = 0
    ) -> Access: ...


# Access by instruction: access, kind, bytes, circumstances.
INSTRUCTIONS: dict[str, tuple[int, int, int, int]] = {
    "read 8": (acc.READ, acc.DATA, 8, 0),
    "write 8": (acc.WRITE, acc.DATA, 8, 0),
    "write 4": (acc.WRITE, acc.DATA, 4, 0),
    "write 1": (acc.WRITE, acc.DATA, 1, 0),
    "fetch": (acc.EXECUTE, acc.DATA, 4, 0),
    "MOVUPS": (acc.WRITE, acc.DATA, 16, 0),
    "VMOVDQU64 zmm": (acc.WRITE, acc.DATA, 64, 0),
    "XCHG m64": (acc.WRITE, acc.READ_MODIFY_WRITE, 8, 0),
    "ADD m64": (acc.WRITE, acc.READ_MODIFY_WRITE, 8, 0),
    "LOCK ADD m64": (acc.WRITE, acc.READ_MODIFY_WRITE, 8, 0),
    "LOCK CMPXCHG (mismatch)": (acc.WRITE, acc.READ_MODIFY_WRITE, 8, 0),
    "PUSH": (acc.WRITE, acc.DATA, 8, 0),
    "REP STOSB": (acc.WRITE, acc.DATA, 64, 0),
    "FXSAVE64": (acc.WRITE, acc.DATA, 512, 0),
    "INT 80h frame": (acc.WRITE, acc.DATA, 40, acc.DELIVERY),
    "shadow-stack write 8": (acc.WRITE, acc.SHADOW_STACK, 8, 0),
    "IRET write 8": (acc.WRITE, acc.DATA, 8, acc.NMI_UNBLOCKING),
    "RTM write 8": (acc.WRITE, acc.DATA, 8, acc.SPP_EXEMPT),
}


def value_of(text: str, names: dict[str, int]) -> int:
    """An expression of the vectors: ORs, shifts, complements of numbers and names."""
    return int(eval(text, {"__builtins__": {}}, names))


def set_up(p: Bench, setup: str) -> None:
    """Apply what a row says before its access."""
    items = [item.strip() for item in setup.split(";") if item.strip() and item.strip() != "-"]
    far = "G39" in items
    if far:
        p.guest(GUEST_PTE, FAR | 0x63)
    names = {**p.tables, "b61": B61, "ALL": ALL}
    if far:
        names |= {"PDPT": p.tables["FPDPT"], "PD": p.tables["FPD"], "PT": p.tables["FPT"]}
    for item in items:
        if item == "AD-ALL":
            preset_flags(p)
        elif item not in ("G39", "no INVEPT"):
            name, operator, text = re.fullmatch(r"(.*?)\s*(\|?=)(.*)", item).groups()  # type: ignore[union-attr]
            assign(p, name, operator == "|=", text, names, far)


def preset_flags(p: Bench) -> None:
    """Accessed and dirty in every EPT entry."""
    t = p.tables
    for name in ("root", "PML4", "PDPT", "PD", "PT", "gPT", "gUpper", "FPDPT", "FPD", "FPT"):
        for index in range(16):
            entry = p.peek(t[name] + 8 * index)
            if entry:
                p.poke(t[name] + 8 * index, entry | (0x300 if "T" in name or name == "gUpper" else 0x100))


def places(p: Bench, far: bool) -> dict[str, int]:
    """Addresses of the entries that rows name."""
    t = p.tables
    pick = (lambda name: t[f"F{name}"]) if far else (lambda name: t[name])
    return {
        "PML4E": t["PML4"] + 8 * far,
        "PML5E": t["root"],
        "PDPTE": pick("PDPT"),
        "PDE": pick("PD") + 8 * 4,
        "PTE": p.leaf(far),
        "PTE raw": p.leaf(far),
        "nextPTE": t["PT"] + 8 * 2,
        "gPTpage.PTE": t["gPT"],
        "gPTpage.PTE raw": t["gPT"],
        "gPTpage.PDE": t["PD"] + 8 * 5,
        "L4E": t["L4"] + 8 * far,
        "L4E[1]": t["L4"] + 8,
        "L3E": pick("L3"),
        "L2E": pick("L2") + 8 * 4,
        "vec": pick("L1") + 8,
        "VEinfo": t["VEB"],
    }


FRAMES_OF = {"PTE": LINEAR, "nextPTE": LINEAR + 0x1000, "gPTpage.PTE": GUEST_PT}
CONTROLS: dict[str, tuple[Any, int]] = {
    "EPTP.AD": (ctl.V_EPTP, 1 << 6),
    "EPTP.SSS": (ctl.V_EPTP, 1 << 7),
    "VE": (ctl.V_SECONDARY, ctl.SECONDARY_VE),
    "PML": (ctl.V_SECONDARY, ctl.SECONDARY_PML),
    "MBEC": (ctl.V_SECONDARY, ctl.SECONDARY_MBEC),
    "paging-write": (ctl.V_TERTIARY, ctl.TERTIARY_PAGING_WRITE),
    "verification": (ctl.V_TERTIARY, ctl.TERTIARY_PAGING_VERIFICATION),
}
WORDS = {
    "SPPTP": ctl.V_SPPTP,
    "EPTP": ctl.V_EPTP,
    "PMLaddr": ctl.V_PML_ADDRESS,
    "VEaddr": ctl.V_VE_ADDRESS,
    "CR0": ctl.V_CR0,
    "CR3": ctl.V_CR3,
}


def assign(p: Bench, name: str, joined: bool, text: str, names: dict[str, int], far: bool) -> None:
    """One ``name=value`` of a setup."""
    where = places(p, far)
    if name == "PMLidx":
        p.vcpu({ctl.V_PML_INDEX: int(text, 16)})
        return
    value = value_of(text, names)
    if name in CONTROLS:
        word, mask = CONTROLS[name]
        p.turn_on(word, mask)
        if word is ctl.V_TERTIARY:
            p.turn_on(ctl.V_PRIMARY, ctl.PRIMARY_TERTIARY)
    elif name in WORDS:
        p.vcpu({WORDS[name]: p.control(WORDS[name]) | value if joined else value})
    elif name == "SPP":
        p.vcpu({ctl.V_SECONDARY: p.control(ctl.V_SECONDARY) & ~ctl.SECONDARY_SPP})
    elif name == "gU":
        for gpa in (GUEST_PML4, GUEST_PDPT, GUEST_PD + 8 * 4, GUEST_PTE):
            p.guest(gpa, p.guest_word(gpa) | 4)
    elif name == "gPTE":
        p.guest(GUEST_PTE, value)
    elif name == "VEinfo[4]":
        p.poke(where["VEinfo"], value << 32)
    elif name == "L2E[5]":
        p.poke(p.tables["L2"] + 8 * 5, p.tables["gL1"] | value & 0xFFF)
    elif name == "vec(gPT)":
        p.poke(p.tables["gL1"], value)
    else:
        frame = (FAR if far and name == "PTE" else FRAMES_OF.get(name, 0)) if not joined else p.peek(where[name])
        p.poke(where[name], frame | value)


def described(text: str) -> tuple[int, int, int, int, int]:
    """The access of a row: access, kind, bytes, circumstances, linear address."""
    name, place = re.fullmatch(r"(.*?) (\+?0x[0-9A-Fa-f]+|\+0)(?: n=64)?", text).groups()  # type: ignore[union-attr]
    linear = LINEAR + int(place, 16) if place.startswith("+") else int(place, 16)
    return *INSTRUCTIONS[name], linear


def make(p: Bench, text: str) -> Access:
    """Make the access of a row."""
    access, kind, size, circumstances, linear = described(text)
    return p.access(access, size, linear, kind=kind, circumstances=circumstances)


@dataclass(frozen=True)
class Expected:
    """One legal outcome; a field that is None may be anything."""

    reason: int
    qualification: int | None = None
    gpa: int | None = None
    error_code: int | None = None


def expectations(text: str, advanced: bool) -> list[Expected]:
    """The legal outcomes of a row; with advanced exit information, bit 10 is set for a final access."""
    found = []
    gpa = re.search(r"gpa=(0x[0-9A-Fa-f]+)", text)
    for option in re.split(r" / | or ", text):
        first = option.split()[0]
        q = re.search(r"(?:q=|^)(0x[0-9A-Fa-f]+)", option)
        number = int(q[1], 16) if q else None
        if first == "OK":
            found.append(Expected(0))
        elif first == "#PF":
            found.append(Expected(-14, error_code=int(option.split("err=")[1], 16)))
        elif first.isdigit() or first == "#VE" or first.startswith("0x"):
            reason = 48 if first.startswith("0x") else -20 if first == "#VE" else int(first)
            if advanced and number is not None and reason in (48, -20) and number & 0x100:
                number |= 0x400
            if reason == 49:
                number = 0
            found.append(Expected(reason, number, int(gpa[1], 16) if gpa else None))
        else:
            raise ValueError(text)
    return found


def satisfies(result: Access, expected: Expected) -> bool:
    """Whether an outcome is the expected one."""
    pairs = (
        (result.reason, expected.reason),
        (result.qualification, expected.qualification),
        (result.gpa, expected.gpa),
        (result.error_code, expected.error_code),
    )
    return all(want is None or got == want for got, want in pairs)


def judge(result: Access, expected: str, advanced: bool) -> None:
    """Assert that an outcome is one of the legal ones."""
    legal = expectations(expected, advanced)
    assert any(satisfies(result, option) for option in legal), (result, legal)
    if result.reason in (48, 66) and all(option.gpa is None for option in legal):
        assert result.gpa == result.gla


def run(p: Bench, setup: str, access: str, expected: str, *, advanced: bool = False) -> None:
    """Run a row. ``advanced``: the bench has advanced exit information, and the row does not show it."""
    set_up(p, setup)
    assert p.enter() == 0
    result = make(p, access)
    if "G39" in setup and "gpa=" not in expected and result.reason in (48, 66):
        expected += f" gpa={FAR:#x}"
    judge(result, expected, advanced)
    flags = re.search(r"leaf A=(\d) D=(\d)", expected)
    if flags:
        assert p.peek(p.leaf()) >> 8 & 3 == int(flags[1]) | int(flags[2]) << 1


RUN = {"[run W8]": acc.WRITE, "[run R8]": acc.READ}


def run_cached(p: Bench, setup: str, access: str, expected: str) -> None:
    """Run a row of table G: accesses between the changes, and INVEPT before the last one unless it says otherwise."""
    changed = re.search("no INVEPT|clear", setup + access) is not None
    for item in setup.split("; "):
        if item in RUN:
            p.access(RUN[item])
        else:
            set_up(p, item)
    if not changed:
        p.invept()
    if access.startswith("write8; clear"):
        assert p.access(acc.WRITE).reason == 0
        set_up(p, "vec=0" if "vec" in access else "PTE=0x35")
        access = "write 8 +0"
    elif access.startswith("read8 +0, then"):
        assert p.access(acc.READ).reason == 0
        access = "write 8 +0x80"
    result = make(p, access)
    judge(result, expected, False)
    assert changed or not result.stale


def run_entry(p: Bench, setup: str, access: str, expected: str) -> None:
    """Run a row of table H: VM entry, and the access where it succeeds."""
    set_up(p, setup)
    if expected == "OK (entry)":
        assert p.enter() == 0
    elif expected == "OK":
        assert p.enter() == 0
        judge(make(p, access), expected, False)
    else:
        assert p.enter() == 7


OPTIONS: dict[str, dict[str, int]] = {
    "": {},
    "52 bits": {"width": 52},
    "5-level": {"levels": 5},
    "no execute-only": {"cap": bench.without(bench.EPT_VPID_CAP, ept.CAP_EXECUTE_ONLY)},
    "no 1-GByte": {"cap": bench.without(bench.EPT_VPID_CAP, ept.CAP_1G)},
    "advanced": {"cap": bench.ADVANCED},
    "shadow stack": {"cap": bench.SHADOW_STACK},
}
