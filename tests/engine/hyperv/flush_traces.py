"""Traces with operations: rows as a client would send them, and the flush calls that go into them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.arch import hypercall as hv
from engine.hyperv.encode import CallFields, VpSet
from engine.machine import VirtualMachine
from engine.trace.readers import open_trace
from engine.trace.results import TraceResult
from engine.trace.session import ReplayOptions
from tests.engine.hyperv.guests import CR3, P1, P2, TEST_PAGE

OLD, NEW = P1, P2
GVA = TEST_PAGE
BLOCK = 0x5000
OTHER_SPACE = 0x200000

Row = dict[str, Any]


def access(vcpu: int, gpa: int, gva: int = GVA, **more: Any) -> Row:
    """A write of 8 bytes."""
    return {"vcpu": vcpu, "gpa": gpa, "gva": gva, **more}


def call(code: int, vcpu: int = 0, **fields: Any) -> Row:
    """A hypercall of a vCPU by the fields of the call."""
    made = CallFields(code, **fields)
    if made.fast:
        first, second, xmm = made.fast_registers()
        rest = b"".join(value.to_bytes(16, "little") for value in xmm)
    else:
        first, second, rest = BLOCK, 0, made.block()
    head = b"".join(word.to_bytes(8, "little") for word in (made.control(), first, second))
    return {"op": 1, "vcpu": vcpu, "arg": (head + rest).hex()}


def flush(*vps: int, vcpu: int = 0, space: int = CR3, pages: Sequence[int] = (GVA,), **fields: Any) -> Row:
    """A flush of pages on the VPs of a mask."""
    mask = sum(1 << vp for vp in vps)
    return call(hv.LIST, vcpu, address_space=space, processor_mask=mask, ranges=tuple(pages), **fields)


def sparse(*vps: int) -> VpSet:
    """The set of these VPs."""
    banks = sorted({vp >> 6 for vp in vps})
    words = tuple(sum(1 << (vp & 63) for vp in vps if vp >> 6 == bank) for bank in banks)
    return VpSet(hv.SET_SPARSE, sum(1 << bank for bank in banks), words)


def mov_cr3(vcpu: int, value: int) -> Row:
    return {"op": 2, "vcpu": vcpu, "arg": value.to_bytes(8, "little").hex()}


def invlpg(vcpu: int, gva: int) -> Row:
    return {"op": 3, "vcpu": vcpu, "gva": gva}


def replayed(vm: VirtualMachine, rows: Sequence[Row], *, split: int = 0, **options: Any) -> TraceResult:
    """Replay rows in one transaction, ``split`` rows a chunk if not 0."""
    chosen = ReplayOptions(**options)
    body = "".join(json.dumps({"op": 0, **row}) + "\n" for row in rows).encode()
    with vm.replay(chosen) as run:
        for chunk in open_trace("ndjson", io.BytesIO(body), carry=chosen.carry):
            for part in parts(chunk, split or len(rows)):
                if not run.feed(part):
                    return run.finish()
        return run.finish()


def parts(chunk: Any, size: int) -> Any:
    """A chunk in pieces."""
    for start in range(0, len(chunk.records), size):
        end = min(start + size, len(chunk.records))
        found = chunk.operations
        inside = (found.at >= start) & (found.at < end)
        items = tuple(
            item._replace(position=item.position - start)
            for item, here in zip(found.items, inside.tolist(), strict=True)
            if here
        )
        yield replace(
            chunk,
            packed=chunk.records[start:end].copy(),
            gva=None if chunk.gva is None else chunk.gva[start:end].copy(),
            carry={name: column[start:end] for name, column in chunk.carry.items()},
            operations=found._replace(at=found.at[inside] - start, items=items, spaces=found.spaces[start:end].copy()),
        )


def stale(result: TraceResult) -> list[tuple[int, str | None, int | None]]:
    """(index, why, index of the operation that missed it) of each stale record."""
    return [
        (item.index, item.missed_by and item.missed_by.why, item.missed_by and item.missed_by.index)
        for item in result.translations.stale_records
    ]
