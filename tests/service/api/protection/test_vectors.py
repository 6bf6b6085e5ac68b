"""Every printed vector over HTTP: the rows that the engine's tests run, set up and executed call by call."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from engine.arch.access import DATA, READ_MODIFY_WRITE
from tests.contract.client import ContractClient
from tests.engine.cpu import vectors
from tests.engine.cpu import vectors_tables as tables
from tests.engine.cpu.bench_machine import ADVANCED, FAR, LINEAR
from tests.service.api.protection.vector_bench import HttpProcessor

BY_GPA = tables.chosen(tables.PERMISSIONS + tables.MISCONFIGURATION + tables.SUBPAGES + tables.WIDTHS)
OTHERS = tables.chosen(tables.GUEST_PAGING + tables.FLAGS_AND_VE)
FULL = (*tables.ADVANCED, *tables.MODE_BASED)
CACHED = tables.chosen(tables.CACHED)
ENTRY = tables.chosen(tables.ENTRY)


def rows(table: tuple[tuple[str, ...], ...]) -> dict[str, object]:
    return {"argvalues": [row[1:] for row in table], "ids": [row[0] for row in table]}


@pytest.fixture
def bench(client: ContractClient, make_vm: Callable[..., str]) -> Callable[..., HttpProcessor]:
    return lambda **options: HttpProcessor(client, make_vm, **options)


@pytest.mark.parametrize(("setup", "access", "expected"), **rows(OTHERS))  # type: ignore[arg-type]
def test_guest_paging_flags_and_ve(bench: Callable[..., HttpProcessor], setup: str, access: str, expected: str) -> None:
    vectors.run(bench(), setup, access, expected)


@pytest.mark.parametrize(("setup", "access", "expected"), **rows(BY_GPA))  # type: ignore[arg-type]
def test_by_gpa(bench: Callable[..., HttpProcessor], setup: str, access: str, expected: str) -> None:
    """What happens to an access of the guest, and what ``walk`` says of its GPA."""
    p = bench()
    vectors.run(p, setup, access, expected)
    name, offset = re.fullmatch(r"(.*?) \+(0x[0-9A-Fa-f]+|0)(?: n=64)?", access).groups()  # type: ignore[union-attr]
    doing, kind, size, circumstances = vectors.INSTRUCTIONS[name]
    at = (FAR if "G39" in setup else LINEAR) + int(offset, 16)
    found = p.walk(doing, size, at, kind, circumstances)
    (legal,) = vectors.expectations(expected, False)
    assert kind in (DATA, READ_MODIFY_WRITE) and found[0] == legal.reason
    if legal.reason:
        assert found[1] == legal.qualification and found[2] == (legal.gpa or at)


@pytest.mark.parametrize(("setup", "access", "expected"), **rows(FULL))  # type: ignore[arg-type]
def test_full(bench: Callable[..., HttpProcessor], setup: str, access: str, expected: str) -> None:
    vectors.run(bench(cap=ADVANCED), setup, access, expected)


@pytest.mark.parametrize(("options", "setup", "access", "expected"), **rows(tables.DERIVED))  # type: ignore[arg-type]
def test_derived(bench: Callable[..., HttpProcessor], options: str, setup: str, access: str, expected: str) -> None:
    vectors.run(bench(**vectors.OPTIONS[options]), setup, access, expected)


def test_k14_a_pdpte_loaded_by_mov_to_cr3(bench: Callable[..., HttpProcessor]) -> None:
    """A paging read without a linear address: bit 7 of the qualification is 0, and so is bit 8."""
    p = bench()
    vectors.set_up(p, "PTE raw=0")
    told = p.client.get(f"{p.vm}/walk?gpa={LINEAR:#x}&kind=paging-read&linear=0")  # KVM's own tables
    assert told.json()["qualification"] == "0x1"
    p.enter()
    told = p.client.get(f"{p.vm}/walk?gpa={LINEAR:#x}&kind=paging-read&linear=0")
    assert (told.json()["reason"], told.json()["qualification"]) == (48, "0x1")


@pytest.mark.parametrize("model", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize(("setup", "access", "expected"), **rows(CACHED))  # type: ignore[arg-type]
def test_cached(bench: Callable[..., HttpProcessor], setup: str, access: str, expected: str, model: bool) -> None:
    vectors.run_cached(bench(model=model), setup, access, expected)


@pytest.mark.parametrize(("setup", "access", "expected"), **rows(ENTRY))  # type: ignore[arg-type]
def test_entry(bench: Callable[..., HttpProcessor], setup: str, access: str, expected: str) -> None:
    vectors.run_entry(bench(), setup, access, expected)


@pytest.mark.parametrize("cache", ["off", "model"])
@pytest.mark.parametrize(
    ("what", "kind", "descriptor", "error"),
    [("invept", *row[1:]) for row in tables.INVEPT] + [("invvpid", *row[1:]) for row in tables.INVVPID],
    ids=[row[0] for row in (*tables.INVEPT, *tables.INVVPID)],
)
def test_operands(
    make_vm: Callable[..., str],
    client: ContractClient,
    what: str,
    kind: int,
    descriptor: tuple[int, ...],
    error: int,
    cache: str,
) -> None:
    vm = make_vm(maxphyaddr=40, translation_cache=cache)
    if what == "invept":
        operands = {"eptp": hex(descriptor[0])}
    else:
        first, linear = descriptor
        operands = {"vpid": first & 0xFFFF, "reserved": hex(first >> 16), "linear_address": hex(linear)}
    reply = client.post(f"{vm}/vcpus/0/{what}", json={"type": hex(kind), **operands})
    assert reply.status_code == 200, reply.text
    assert reply.json() == {
        "result": "VMfail" if error else "VMsucceed",
        "vm_instruction_error": error or None,
        "exception": None,
        "exit_reason": None,
    }
