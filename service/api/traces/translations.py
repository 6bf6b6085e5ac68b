"""What a trace says about translations: its operations, and accesses by translations that should have been gone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from engine.arch import hypercall as hv
from engine.trace.operations import LARGEST_ARGUMENT
from engine.trace.results import TraceResult
from engine.trace.translations import MISSES, MOST_LISTED, Miss, PerformedOperation, StaleTranslation
from service.http.wire_types import Document, Hex64, examples

# HvCallFlushVirtualAddressList: the registers, then address space, flags, VP 1, one range.
_FLUSH_WORDS = (0x1_0000_0003, 0x5000, 0, 0x100000, 0, 1 << 1, 0x7F0000001000)
_FLUSH = {"op": 1, "vcpu": 0, "arg": b"".join(word.to_bytes(8, "little") for word in _FLUSH_WORDS).hex()}

EXAMPLE_STALE = {
    "index": 12,
    "vcpu": 1,
    "vp_index": 5,
    "gva": "0x7f0000001000",
    "address_space": "0x100000",
    "size": 8,
    "access": 1,
    "gpa": "0x12000",
    "cached_gpa": "0x11000",
    "cached_at": 0,
    "changed_after": 4,
    "missed_by": {"index": 7, "op": "hypercall", "why": "not-targeted", "flushed": [0], "status": "0x0"},
    "explanation": (
        "VP 5 needed a flush of 0x7f0000001000 after record 4 and before record 12: HvCallFlushVirtualAddressList or "
        "HvCallFlushVirtualAddressSpace with that VP, or INVLPG or a load of CR3 on it; HvCallFlushVirtualAddressList "
        "at record 7 flushed VPs {0}; VP 5 was not in its processor set"
    ),
}

EXAMPLE_OPERATION = {
    "index": 7,
    "vcpu": 0,
    "op": "hypercall",
    "operand": "0x100000003",
    "call": "HvCallFlushVirtualAddressList",
    "outcome": "completed",
    "status": "0x0",
    "status_name": "SUCCESS",
    "targeted": [0],
    "flushed": [0],
    "dropped": 1,
    "left": 0,
}


_OP = "^((0x)?[1-3]|hypercall|mov-cr3|invlpg)$"

# Of a record: the columns that there are, and those that are ignored (engine.trace.readers.rows).
MOST_MEMBERS = 256


class OperationRecord(Document):
    """An operation between the accesses of a trace. Its other members mean nothing."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"maxProperties": MOST_MEMBERS, **examples(_FLUSH, {"op": 3, "gva": "0x7f0000001000"})},
    )

    op: Annotated[int, Field(ge=1, le=3)] | Annotated[str, Field(pattern=_OP)] = Field(
        description="1 `hypercall`, 2 `mov-cr3`, 3 `invlpg`."
    )
    vcpu: int = Field(0, ge=0, le=0xFFFF, description="KVM vCPU id of who executes it.")
    arg: str | None = Field(
        None,
        pattern=r"^([0-9a-f]{2})*$",
        max_length=2 * LARGEST_ARGUMENT,
        description=(
            "Bytes, lower-case hex in memory order. A hypercall's: RCX, RDX, R8, then XMM0 to XMM5 of a fast call, or "
            "the block, which is stored at RDX first. A mov-cr3's operand and an invlpg's address: 8 bytes."
        ),
    )
    gva: Hex64 | None = Field(None, description="Of an invlpg without `arg`: the linear address.")
    address_space: Hex64 | None = Field(
        None, description="The vCPU's CR3; of a mov-cr3 without `arg`, its operand. Null: as it was."
    )


class OperationCounts(Document):
    """Operations of a trace that were executed."""

    hypercall: int = Field(description="Hypercalls.")
    mov_cr3: int = Field(description="MOVs to CR3.")
    invlpg: int = Field(description="INVLPGs.")


class TranslationTotals(Document):
    """What is counted of translations; zeros for a trace without operations and address spaces."""

    stale_translations: int = Field(
        0, description="Accesses by a cached translation to another GPA than the recorded one: a flush is missing."
    )
    operations: OperationCounts = Field(
        default=OperationCounts(hypercall=0, mov_cr3=0, invlpg=0), description="Those after `start`."
    )


class MissedBy(Document):
    """The operation that came nearest to removing a translation."""

    index: int = Field(description="Its position in the trace.")
    op: Literal["hypercall", "mov-cr3", "invlpg"] = Field(description="What it was.")
    why: Literal[MISSES] = Field(description="Why the translation stayed.")  # type: ignore[valid-type]
    flushed: list[int] = Field(description="VP indices that the flush reached.")
    status: Hex64 | None = Field(description="Of a hypercall that has one.")


class StaleRecord(Document):
    """An access by a translation that should have been gone, or the part of one in a page."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE_STALE))

    index: int = Field(description="Position of the access in the trace.")
    vcpu: int = Field(description="KVM vCPU id.")
    vp_index: int = Field(description="Hyper-V VP index.")
    gva: Hex64 = Field(description="Linear address.")
    address_space: Hex64 = Field(description="Page tables: CR3 without PCID.")
    size: int = Field(description="In bytes.")
    access: int = Field(description="0 read, 1 write, 2 execute.")
    gpa: Hex64 = Field(description="As recorded.")
    cached_gpa: Hex64 = Field(description="As the translation has it; the access took place there.")
    cached_at: int | None = Field(description="The record that made the translation; null: it was there before.")
    changed_after: int | None = Field(description="The last record, of any vCPU, that had the old page; null: none.")
    missed_by: MissedBy | None = Field(description="Null: nothing came near.")
    explanation: str = Field(description="The same in a sentence.")


class PerformedRecord(Document):
    """An operation of the trace, executed."""

    model_config = ConfigDict(json_schema_extra=examples(EXAMPLE_OPERATION))

    index: int = Field(description="Position in the trace.")
    vcpu: int = Field(description="KVM vCPU id.")
    op: Literal["hypercall", "mov-cr3", "invlpg"] = Field(description="What it is.")
    operand: Hex64 = Field(description="The input value of a hypercall, the operand of MOV to CR3, the linear address.")
    call: str | None = Field(description="Name of a hypercall that flushes.")
    outcome: Literal["completed", "exception", "intercepted", "suspended", "reflected", "native", "exit"] = Field(
        description="How it ended."
    )
    status: Hex64 | None = Field(description="Of a hypercall that has one; one that is refused flushes nothing.")
    status_name: str | None = Field(description="The status as the TLFS has it.")
    targeted: list[int] = Field(description="VP indices that it was for.")
    flushed: list[int] = Field(description="VP indices that have done it.")
    dropped: int = Field(description="Translations that went.")
    left: int = Field(description="Translations that the specification says must go, and that stayed or wait.")


class TranslationRecords(Document):
    """What is listed of translations, in order; empty for a trace without operations and address spaces."""

    stale_records: list[StaleRecord] = Field(
        default=[], description=f"The first {MOST_LISTED:,} accesses by stale translations."
    )
    stale_records_dropped: int = Field(0, description="Accesses that are counted but not listed.")
    operation_records: list[PerformedRecord] = Field(default=[], description=f"The first {MOST_LISTED:,} operations.")
    operation_records_dropped: int = Field(0, description="Operations that are counted but not listed.")


def translation_totals(result: TraceResult) -> dict[str, Any]:
    """The members of ``TranslationTotals``."""
    counts = result.translations.operations
    return {
        "stale_translations": result.translations.stale,
        "operations": {name: counts.get(name.replace("_", "-"), 0) for name in OperationCounts.model_fields},
    }


def translation_records(result: TraceResult) -> dict[str, Any]:
    """The members of ``TranslationRecords``."""
    found = result.translations
    return {
        "stale_records": [_stale(item) for item in found.stale_records],
        "stale_records_dropped": found.stale_dropped,
        "operation_records": [_performed(item) for item in found.operation_records],
        "operation_records_dropped": found.operations_dropped,
    }


def _stale(item: StaleTranslation) -> dict[str, Any]:
    return {
        "index": item.index,
        "vcpu": item.vcpu,
        "vp_index": item.vp_index,
        "gva": hex(item.gva),
        "address_space": hex(item.address_space),
        "size": item.size,
        "access": item.access,
        "gpa": hex(item.gpa),
        "cached_gpa": hex(item.cached_gpa),
        "cached_at": item.cached_at,
        "changed_after": item.changed_after,
        "missed_by": None if item.missed_by is None else _miss(item.missed_by),
        "explanation": item.explanation,
    }


def _miss(miss: Miss) -> dict[str, Any]:
    return {
        "index": miss.index,
        "op": miss.op,
        "why": miss.why,
        "flushed": list(miss.flushed),
        "status": None if miss.status is None else hex(miss.status),
    }


def _performed(item: PerformedOperation) -> dict[str, Any]:
    call = hv.CALLS.get(item.operand & hv.CODE_MASK) if item.op == "hypercall" else None
    status = None if item.result is None else hv.status_of(item.result)
    return {
        "index": item.index,
        "vcpu": item.vcpu,
        "op": item.op,
        "operand": hex(item.operand),
        "call": None if call is None else call.name,
        "outcome": item.outcome,
        "status": None if status is None else hex(status),
        "status_name": None if status is None else status.name,
        "targeted": list(item.targeted),
        "flushed": list(item.flushed),
        "dropped": item.dropped,
        "left": item.left,
    }
