"""Exit records as columns: types, slices, names, and several runs joined."""

from __future__ import annotations

import numpy as np
import pytest

from engine.arch import exits as arch_exits
from engine.kvm import resolutions as res
from engine.kvm import vcpu_run
from engine.kvm.resolutions import RESOLUTION_NAMES
from engine.kvm.user_exits import user_exit
from engine.trace.results import EXIT_COLUMNS, ExitColumns, columns_of_log, join


def log_row(**words: int) -> list[int]:
    """A row of the exit buffer: an 8-byte write at 0x5200 that is refused, unless told otherwise."""
    row = [0] * vcpu_run.EXIT_WORDS
    row[vcpu_run.EXIT_INDEX] = words.get("index", 7)
    row[vcpu_run.EXIT_GPA] = words.get("gpa", 0x5200)
    row[vcpu_run.EXIT_RECORD] = words.get("size", 8) | words.get("access", 1) << 16 | words.get("vcpu", 3) << 32
    row[vcpu_run.EXIT_GVA] = words.get("gva", -0x1000)
    row[vcpu_run.EXIT_QUALIFICATION] = words.get("qualification", 0x1AA)
    row[vcpu_run.EXIT_REASON] = words.get("reason", 48) | words.get("resolution", res.VIOLATION) << 16
    row[vcpu_run.EXIT_DENIED] = words.get("denied", 0x10)
    row[vcpu_run.EXIT_AT] = words.get("at", 0x5200)
    return row


def columns(*rows: list[int], has_gva: bool = True, **carry: np.ndarray) -> ExitColumns:
    values, record_gpa = columns_of_log(np.array(rows, dtype=np.int64).reshape(-1, vcpu_run.EXIT_WORDS))
    return ExitColumns(values, record_gpa, has_gva, carry)


def test_columns_of_one_exit() -> None:
    made = columns(log_row())
    assert {name: made.column(name).tolist()[0] for name in made.columns} == {
        "index": 7,
        "vcpu": 3,
        "reason": 48,
        "qualification": 0x1AA,
        "gpa": 0x5200,
        "gva": (1 << 64) - 0x1000,
        "size": 8,
        "access": 1,
        "gfn": 5,
        "subpages": 1 << 4,
        "denied": 1 << 4,
        "resolution": res.VIOLATION,
        "stale": 0,
        "source": 0,
        "insn_len": 0,
    }
    assert [(name, str(made.column(name).dtype)) for name in made.columns] == [row[:2] for row in EXIT_COLUMNS]


SUBPAGES = [
    ("one", 0x5000, 8, 0x5000, 1),
    ("last", 0x5FF8, 8, 0x5FF8, 1 << 31),
    ("two", 0x507C, 8, 0x507C, 3),
    ("first of two pages", 0x5FFC, 8, 0x5FFC, 1 << 31),
    ("second of two pages", 0x5FFC, 8, 0x6000, 1),
    ("page in the middle", 0x5FFC, 9000, 0x6000, 0xFFFF_FFFF),
    ("end in a later page", 0x5000, 0x1081, 0x6000, 3),
]


@pytest.mark.parametrize(("gpa", "size", "at", "mask"), [row[1:] for row in SUBPAGES], ids=[row[0] for row in SUBPAGES])
def test_sub_pages_of_the_page_that_exits(gpa: int, size: int, at: int, mask: int) -> None:
    made = columns(log_row(gpa=gpa, size=size, at=at))
    assert (made.column("subpages").tolist(), made.column("gfn").tolist()) == ([mask], [at >> 12])
    assert made.record_gpa.tolist() == [gpa]


def test_slice_keeps_every_column() -> None:
    pc = np.arange(5, dtype=np.uint32)
    made = columns(*(log_row(index=i) for i in range(5)), pc=pc)
    part = made[1:3]
    assert (len(made), len(part), len(made[9:])) == (5, 2, 0)
    assert part.column("index").tolist() == part.carry["pc"].tolist() == [1, 2]
    assert part.has_gva and part.objects() == [[], []]


def test_names() -> None:
    made = columns(
        log_row(reason=48, access=0),
        log_row(reason=66, resolution=res.FILLED, access=2),
        log_row(reason=99, resolution=res.INTERNAL_ERROR),
    )
    assert made.reason_names() == ["EPT violation", "SPP-related event", "99"]
    assert made.resolution_names() == ["violation", "sppt-filled", "internal-error"]
    assert made.access_names() == ["read", "execute", "write"]
    assert set(arch_exits.NAMES) == {48, 49, 62, 66}


def test_joining() -> None:
    empty = columns()
    assert join([], empty) is empty
    one = columns(log_row(index=1), pc=np.array([10]))
    assert join([one], empty) is one
    both = join([one, columns(log_row(index=2), log_row(index=3), pc=np.array([20, 30]))], empty)
    assert both.column("index").tolist() == [1, 2, 3]
    assert both.carry["pc"].tolist() == [10, 20, 30]
    assert len(both.record_gpa) == 3 and both.objects() == [[], [], []]


@pytest.mark.parametrize("resolution", RESOLUTION_NAMES)
@pytest.mark.parametrize(("profile", "number", "advanced"), [("kvm-2019", 28, True), ("kvm-latest", 29, False)])
@pytest.mark.parametrize(("reason", "errno"), [(66, "EFAULT"), (49, "EINVAL")])
def test_what_user_space_sees(
    resolution: str, profile: str, number: int, advanced: bool, reason: int, errno: str
) -> None:
    seen = user_exit(RESOLUTION_NAMES.index(resolution), reason, 0x5200, profile)
    wanted = {
        "violation": (number, "KVM_EXIT_SPP", advanced, 0x5200, None),
        "mmio": (6, "KVM_EXIT_MMIO", True, None, None),
        "internal-error": (0, "KVM_EXIT_UNKNOWN", False, None, 66)
        if reason == 66
        else (17, "KVM_EXIT_INTERNAL_ERROR", False, None, None),
        "run-failed": (0, "KVM_EXIT_UNKNOWN", False, None, None),
    }.get(resolution)
    if wanted is None:
        assert seen is None
        return
    assert seen is not None
    assert (seen.exit_reason, seen.name, seen.rip_advanced, seen.spp_addr, seen.hw_exit_reason) == wanted
    assert seen.errno == (errno if resolution == "run-failed" else None)
