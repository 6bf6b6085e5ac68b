"""Random sequences: a world, and calls that one of the three series is about, or all of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from tests.differential import structures as made
from tests.differential.calls import PAGE, PROFILES, Call, Sequence, World

SUBJECTS = ("subpages", "flush", "nested", "all")
Maker = Callable[[], Call]
RAM = struct.pack("<IIQQQ", 0, 0, 0, 16 * PAGE, 0x7F00_0000_0000)
# What a call has left is looked at more often than not.
LOOKED_AT = {
    "KVM_SET_NESTED_STATE": Call(
        "KVM_GET_NESTED_STATE", "vcpu", bytes(4) + (8320).to_bytes(4, "little") + b"\xee" * 8440
    ),
    "KVM_SET_SREGS": Call("KVM_GET_SREGS", "vcpu", b"\xee" * 312),
    "KVM_SET_CPUID2": Call("KVM_GET_CPUID2", "vcpu", struct.pack("<II", 9, 0) + b"\xee" * 360),
}
INIT = struct.pack("<IIQ", 182, 0, 0).ljust(104, b"\0")


def drawn(seed: int, index: int) -> tuple[World, Sequence]:
    """The sequence of a seed and a number."""
    rng = random.Random(f"{seed}/{index}")
    profile = PROFILES[index % 2]
    subject = rng.choice(SUBJECTS)
    world = _world(rng, profile, subject)
    calls: list[Call] = list(_start(rng, world, subject))
    makers = _makers(rng, world, subject)
    for _ in range(rng.randint(3, 11)):
        calls.append(rng.choice(makers)())
        if calls[-1].name in LOOKED_AT and rng.random() < 0.6:
            calls.append(LOOKED_AT[calls[-1].name])
    return world, tuple(calls)


def _world(rng: random.Random, profile: str, subject: str) -> World:
    if subject == "subpages":
        return World(
            profile,
            nested=rng.random() < 0.1,
            ept=rng.random() < 0.95,
            spp=rng.random() < 0.95,
            fail_allocation=rng.choice((None, None, None, 1, 2, 3, 5)),
        )
    if subject == "flush":
        vendor = rng.choice(("intel", "intel", "amd"))
        hyperv = rng.choice(("", "direct", "direct", "plain", "full"))
        return World(profile, vendor, nested=rng.random() < 0.8, hyperv=hyperv, irqchip=rng.random() < 0.8)
    if subject == "nested":
        vendor = rng.choice(("amd", *["intel"] * 12))
        return World(profile, vendor, nested=rng.random() < 0.95)
    return World(profile, nested=rng.random() < 0.7, hyperv=rng.choice(("", "direct")))


def _start(rng: random.Random, world: World, subject: str) -> Sequence:
    """What most sequences begin with, so that the rest meets something."""
    memory = Call("KVM_SET_USER_MEMORY_REGION", "vm", RAM)
    on = Call("KVM_ENABLE_CAP", "vm", INIT) if world.latest else Call("KVM_INIT_SPP", "vm")
    if subject == "subpages":
        touched = [made.touch(rng) for _ in range(rng.choice((0, 0, 1, 3)))]
        return (memory, on, *touched) if rng.random() < 0.92 else ()
    if subject == "flush" or not world.intel:
        return ()
    linked = Call("POKE", "", made.shadow_vmcs12(rng), arg=made.LINKED)
    start: Sequence = (memory, linked) if subject == "nested" else (memory, on) if rng.random() < 0.6 else (memory,)
    if rng.random() < 0.95:
        start += (made.set_cpuid(rng),)
    if rng.random() < 0.4:
        start += (made.enable_cap(rng, "vcpu", 163),)
    return start


def _makers(rng: random.Random, world: World, subject: str) -> list[Maker]:
    latest = world.latest
    memory: list[Maker] = [
        lambda: made.region(rng, latest),
        lambda: made.region(rng, latest),
        lambda: made.touch(rng),
        *[lambda: made.subpages(rng, latest)] * 4,
        lambda: rng.choice((Call("KVM_INIT_SPP", "vm"), made.enable_cap(rng, "vm", 182))),
        lambda: made.check_extension(rng),
    ]
    flush: list[Maker] = [
        lambda: made.check_extension(rng),
        *[lambda: made.enable_cap(rng, "vcpu", rng.choice((163, 175, 175, 199, *made.CAPABILITIES)))] * 2,
        lambda: made.enable_cap(rng, "vm", rng.choice((163, 175, 199, 182, 0xFFFF))),
        lambda: made.get_table(rng, "KVM_GET_SUPPORTED_HV_CPUID", "vcpu", 10 if latest else 7),
        lambda: made.get_table(rng, "KVM_GET_SUPPORTED_HV_CPUID", "system", 10),
        lambda: (
            Call(rng.choice(("KVM_SET_NESTED_STATE", "KVM_INIT_SPP")), rng.choice(("system", "vm", "vcpu")), bytes(8))
            if subject == "flush" and rng.random() < 0.2
            else made.check_extension(rng)
        ),
    ]
    nested: list[Maker] = [
        *[lambda: made.nested_state(rng)] * 5,
        *[lambda: made.get_nested_state(rng)] * 4,
        lambda: Call("KVM_SET_NESTED_STATE", "vcpu", of_last_get=True),
        lambda: made.enable_cap(rng, "vcpu", 163),
    ]
    registers: list[Maker] = [
        lambda: made.set_cpuid(rng),
        lambda: made.get_table(rng, "KVM_GET_CPUID2", "vcpu", 8),
        lambda: made.set_sregs(rng, latest),
        lambda: Call("KVM_GET_SREGS", "vcpu", b"\xee" * 312),
        lambda: made.events(rng),
        lambda: Call("KVM_GET_VCPU_EVENTS", "vcpu", b"\xee" * 64),
        lambda: made.msrs(rng, "KVM_SET_MSRS"),
        lambda: made.msrs(rng, "KVM_GET_MSRS"),
        lambda: Call("POKE", "", made.shadow_vmcs12(rng), arg=made.LINKED),
    ]
    if not world.intel:
        return flush if subject == "flush" else [*flush, *nested[:9]]
    return {
        "subpages": memory,
        "flush": [*flush, *registers[:2]],
        "nested": [*nested, *registers],
        "all": [*memory, *flush, *nested, *registers[:-1]],
    }[subject]
