"""Events that can be told from a machine before and after a change, whichever route or ioctl made it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from engine.kvm.protections import Protection
from engine.kvm.resolutions import VIOLATION
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec
from engine.machine import SubpageRange, VirtualMachine
from engine.trace.results import ExitColumns
from service.runtime.events import Note
from service.runtime.traces import PART, Trace

# An event names so many ranges or objects; a larger change is told by its totals.
_LISTED = 64


def created(machine: VirtualMachine, origin: str | None = None) -> Note:
    """A machine has come into being, perhaps as the clone of another one."""
    config = machine.config
    detail = {
        "change": "created",
        "name": config.name,
        "profile": config.profile,
        "vcpus": [vcpu.id for vcpu in config.vcpus],
        "memory_slots": [_slot(spec) for spec in machine.slots()],
        "spp": machine.spp_active,
    }
    return Note("lifecycle", detail if origin is None else {**detail, "origin": origin})


def changes_of(before: VirtualMachine, after: VirtualMachine) -> Iterator[Note]:
    """What differs in slots, protections and vCPUs, and whether SPP is enabled."""
    if before.config is not after.config:
        known = {vcpu.id for vcpu in before.config.vcpus}
        for vcpu in after.config.vcpus:
            if vcpu.id not in known:
                yield Note("vcpu", {"change": "created", "vcpu": vcpu.id})
    if after.memory_slots.known is not before.memory_slots.known:
        yield from _slots(before.memory_slots.known, after.memory_slots.known)
    if not before.spp_active and after.spp_active:
        yield Note("lifecycle", {"change": "spp-enabled"})
    same = after.state.current.protections is before.state.current.protections  # as after nearly every change
    if not same and after.protections() != before.protections():
        yield from _protections(before.protections(), after.protections())


def _slots(before: SlotMap, after: SlotMap) -> Iterator[Note]:
    for key in after.changed_since(before):
        was, now = before.get(key), after.get(key)
        spec = now or was
        if spec is not None and was != now:
            change = "created" if was is None else "deleted" if now is None else "changed"
            yield Note("memory-slot", {"change": change, **_slot(spec)})


def _slot(spec: SlotSpec) -> dict[str, Any]:
    return {
        "slot": spec.slot,
        "address_space": spec.address_space,
        "gpa": hex(spec.gpa),
        "size": hex(spec.size),
        "read_only": spec.read_only,
        "log_dirty": spec.log_dirty,
    }


def _protections(before: Sequence[Protection], after: Sequence[Protection]) -> Iterator[Note]:
    known, left = {item.name: item for item in before}, {item.name: item for item in after}
    for name, protection in known.items():
        if left.get(name) is not protection:
            yield Note("protection", {"change": "deleted", "name": name})
    for name, protection in left.items():
        if known.get(name) is not protection:
            detail = {"change": "created", "name": name, **_covered(protection)}
            yield Note("protection", detail)


def _covered(protection: Protection) -> dict[str, Any]:
    """The first objects and ranges of pages, and how many there are."""
    objects, ranges = protection.objects, protection.ranges
    return {
        "objects": [{"name": o.name, "gpa": hex(o.gpa), "size": o.size} for o in objects[:_LISTED]],
        "objects_total": len(objects),
        "page_ranges": [[hex(r.gfn), r.npages, hex(r.access)] for r in ranges[:_LISTED]],
        "page_ranges_total": len(ranges),
    }


# What replays refused


def batches_of(traces: Iterable[Trace]) -> Iterator[Note]:
    """One note for each replay that was refused something: a violation for every exit record that says so.

    ``listed`` of them have records; ``parts`` counts those of each part, null where every record is one. A trace that
    is published bit by bit has a note for each bit, and its records are the ``rows`` after the ``from`` first ones.
    """
    for trace in traces:
        exits, bit = trace.result.exit_columns, trace.publication
        told, offset = (bit.told, bit.told - bit.first) if bit is not None else (0, 0)
        refused = exits.column("resolution")[offset:] == VIOLATION
        listed = int(np.count_nonzero(refused))
        new = trace.result.violations - (bit.violations_told if bit is not None else 0)
        unlisted = max(0, new - listed) if trace.result.exit_records_dropped else 0
        parts = None
        if listed != len(refused):
            bounds = [max(0, at - offset) for at in range(0, offset + len(refused) + PART, PART)]
            parts = [int(np.count_nonzero(refused[a:b])) for a, b in pairwise(bounds)]
        detail: dict[str, Any] = {"listed": listed, "parts": parts}
        if told:
            detail |= {"from": told, "rows": len(refused)}
        if listed + unlisted:
            yield Note("violation", detail, listed + unlisted, trace.id)


def refused(exits: ExitColumns) -> int | None:
    """Position of the exit record that says how a single access was refused, None for one that was not."""
    found = np.flatnonzero(exits.column("resolution") == VIOLATION)
    return int(found[-1]) if len(found) else None


# What routes say themselves


def subpages_set(ranges: Sequence[SubpageRange]) -> dict[str, Any]:
    """Detail of an event ``subpages``."""
    return {
        "ranges": [{"gfn": hex(item.gfn), "npages": item.npages} for item in ranges[:_LISTED]],
        "ranges_total": len(ranges),
        "pages": sum(item.npages for item in ranges),
    }


def pages_set(gfns: Sequence[int]) -> dict[str, Any]:
    """Detail of an event ``page-access``."""
    return {"gfns": [hex(gfn) for gfn in gfns[:_LISTED]], "pages": len(gfns)}


def of_ioctl(name: str, vcpu: int | None, content: bytes, returns: int, errno: str | None) -> Note | None:
    """What a call of the binary ABI did that the machine does not show by itself. ``content`` begins at its argument.

    The pages of KVM_SUBPAGES_SET_ACCESS are those that it was asked for: it may fail after some of them.
    """
    if name == "KVM_SUBPAGES_SET_ACCESS" and len(content) >= 16 and (returns > 0 or errno == "EFAULT"):
        gfn, npages = struct.unpack_from("<QI", content)
        detail = {"ranges": [{"gfn": hex(gfn), "npages": npages}], "ranges_total": 1, "pages": max(returns, 0)}
        return Note("subpages", {**detail, "ioctl": name, "errno": errno})
    if name == "KVM_SET_NESTED_STATE":
        return Note("nested", {"vcpu": vcpu, "ioctl": name, "errno": errno})
    return None
