"""Both sides asked the same, and the smallest sequence that still differs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from tests.differential.calls import Answer, Call, Sequence, World
from tests.differential.entry_model import HostCaps
from tests.differential.facade import Facade
from tests.differential.model import Model
from tests.differential.nested_model import with_caps

CAPABILITY_MSRS = (0x485, 0x48B, 0x48C, 0x491)
GETS = {"KVM_GET_NESTED_STATE": "KVM_SET_NESTED_STATE"}


@dataclass(frozen=True)
class Difference:
    """A call that the two sides answer differently, and the calls before it."""

    world: World
    calls: Sequence
    engine: Answer
    model: Answer

    @property
    def call(self) -> Call:
        """The call that is answered differently."""
        return self.calls[-1]

    def __str__(self) -> str:
        lines = [str(self.world), *(f"  {number}. {_shown(call)}" for number, call in enumerate(self.calls))]
        (first, data, memory), (second, expected, other) = self.engine.told(), self.model.told()
        lines.append(f"  engine {first}, model {second}")
        for name, mine, its in (("data", data, expected), ("memory", memory, other)):
            if mine != its:
                lines.append(f"  {name}: {_places(mine or b'', its or b'')}")
        return "\n".join(lines)


def _shown(call: Call) -> str:
    data = "" if call.data is None else call.data.rstrip(call.data[-1:]).hex()
    data = data if len(data) <= 640 else f"{data[:640]}… ({len(call.data or b'')} bytes)"
    rest = f" arg={call.arg:#x}" if call.arg else ""
    rest += " read-only" if call.read_only else ""
    rest += f" segment={call.segment[0]:#x}:{call.segment[1].hex()}" if call.segment else ""
    rest += " (what the last GET left)" if call.of_last_get else ""
    length = "NULL" if call.data is None else f"{len(call.data)} bytes"
    return f"{call.name} at {call.level or 'guest'}: {length} {data}{rest}"


def _places(engine: bytes, model: bytes) -> str:
    if len(engine) != len(model):
        return f"{len(engine)} and {len(model)} bytes"
    found = [at for at in range(len(engine)) if engine[at] != model[at]]
    return ", ".join(f"{at}: {engine[at]:02x}/{model[at]:02x}" for at in found[:12]) + (" …" if found[12:] else "")


@cache
def host_caps(profile: str) -> HostCaps:
    """The capabilities that the sources leave to the host, as a vCPU with VMX tells them."""
    side = Facade(World(profile))
    rows = ((1, 0, 0, 0x5_0654, 0, 1 << 5, 0x0FA8_FBFF),)
    table = struct.pack("<II", len(rows), 0) + b"".join(struct.pack("<7I12x", *row) for row in rows)
    assert side.answer(Call("KVM_SET_CPUID2", "vcpu", table)).returns == 0
    raw = struct.pack("<II", len(CAPABILITY_MSRS), 0) + b"".join(struct.pack("<IIQ", n, 0, 0) for n in CAPABILITY_MSRS)
    told = side.answer(Call("KVM_GET_MSRS", "vcpu", raw)).data or b""
    values = {number: value for number, _, value in struct.iter_unpack("<IIQ", told[8:])}
    return with_caps(HostCaps(), values)


def difference(world: World, calls: Sequence) -> Difference | None:
    """The first call that the two answer differently."""
    engine, model = Facade(world), Model(world, host_caps(world.profile))
    last: dict[str, bytes | None] = {}
    done: list[Call] = []
    for call in calls:
        if call.of_last_get:
            call = replace(call, data=last.get(call.name))
        done.append(call)
        mine, its = engine.answer(call), model.answer(call)
        if replace(mine, unsaid=its.unsaid).told() != its.told():
            return Difference(world, tuple(done), replace(mine, unsaid=its.unsaid), its)
        if call.name in GETS:
            last[GETS[call.name]] = mine.data
    return None


def smallest(found: Difference, differs: Callable[[World, Sequence], Difference | None] = difference) -> Difference:
    """Drop calls as long as what is left differs."""
    at = 0
    while at < len(found.calls) - 1:
        without = found.calls[:at] + found.calls[at + 1 :]
        again = differs(found.world, without)
        if again is None:
            at += 1
        else:
            found = again
    return found
