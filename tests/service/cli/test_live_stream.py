"""What is said of a guest while it is watched, and at its end, against a service that is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.cli.connection import Service
from service.cli.guests import Watch
from service.cli.live_stream import Machine
from service.cli.symbol_policies import read_symbols
from tests.support.waiting import until

# An address of user space fits JSON's numbers, and comes as one; one of the kernel is text.
USER, KERNEL = 0x400082, "0xffffffff81000010"


def violation(id: int, pc: int | str) -> dict[str, Any]:
    detail = {"objects": ["secret"], "size": 8, "gpa": "0x8000", "gva": "0x8000", "index": id, "pc": pc}
    return {"id": id, "detail": detail}


class Told:
    """A service whose machine has two violations, and that machine."""

    id = "vm_3f9c2a1be07d4c55"

    @contextmanager
    def client(self) -> Iterator[Any]:
        yield SimpleNamespace(vm=lambda id: self)

    def events(self, after: str, kinds: str) -> list[dict[str, Any]]:
        found = [violation(1, USER), violation(2, KERNEL)]
        return [event for event in found if event["id"] > int(after)]

    def traces(self) -> list[Any]:
        return []

    def trace(self, id: str) -> Any:
        return SimpleNamespace(exits=lambda: [event["detail"] for event in self.events("0", "violation")])


def test_who_wrote_is_told_with_and_without_symbols(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text("ffffffff81000000 T _text\nffffffff81000100 T _etext\n")
    for named, writer in ((False, KERNEL), (True, "_text+0x10")):
        told = Told()
        machine = Machine(cast(Any, told), cast(Any, None), cast(Any, None))
        if named:
            machine._symbols = read_symbols(symbols, slide=0, phys_base=0).table
        watch = SimpleNamespace(stores=2, recording=SimpleNamespace(behind=0), extra="")
        with machine.telling(cast(Service, told), cast(Watch, watch)):
            until(lambda watch=watch: bool(watch.extra))
        assert watch.extra == ", 2 violations, 2 stores ahead of the verdict"
        said = capfd.readouterr().err.splitlines()
        assert said == [
            "violation: secret: 8 bytes at 0x8000 (gva 0x8000) by 0x400082, record 1",
            f"violation: secret: 8 bytes at 0x8000 (gva 0x8000) by {writer}, record 2",
        ]
    assert machine.writers({"id": "tr_1", "violations": 2}) == [
        "Who wrote to what:",
        "  secret: 1 writes by 0x400082",
        f"  secret: 1 writes by {KERNEL}",
    ]
