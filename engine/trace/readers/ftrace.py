"""``ftrace``: events of KVM in the text of tracefs, of ``trace-cmd report`` and of ``perf script``.

``COMM-PID [CPU] FLAGS SECONDS: EVENT: FIELDS`` (Documentation/trace/ftrace.rst). ``kvm_mmio`` is in
include/trace/events/kvm.h, ``kvm_page_fault`` in arch/x86/kvm/trace.h, whose fields came in three forms: only the
address and the error code without ``0x`` (up to 5.17), with vCPU and RIP, and with ``0x`` throughout (since 6.2).

The error code of ``kvm_page_fault`` is the exit qualification on Intel (vmx.c), the page-fault error code on AMD
(svm.c): a write is bit 1 of both, a fetch bit 2 of the one and bit 4 of the other. Bit 7 tells them apart: the linear
address is valid, which it is but for loads of PDPTEs, and no error code has it.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.trace.lines import patterns as p
from engine.trace.lines.patterns import (
    ACCESS,
    ADDRESS,
    PC,
    SIZE,
    TIME,
    VALUE,
    VALUED,
    VCPU,
    A,
    Line,
    Parts,
    choice,
    choice_of,
    constant,
    decimal,
    hexadecimal,
    maybe,
    record,
    rest,
    skip,
    spaces,
    stamp,
    start,
    sure,
    text,
    until,
)
from engine.trace.readers.tool_format import Refinement, ToolFormat

ASSUMED_SIZE = 8
_FAULT = 1  # tag of rows whose ACCESS is still to come from the error code in A

# Bits of an exit qualification, and of a page-fault error code with those of nested paging (APM vol. 2, 15.25.6).
_WRITE, _GLA_VALID, _FETCH, _CODE_FETCH = 1 << 1, 1 << 7, 1 << 2, 1 << 4
_NESTED = 1 << 32 | 1 << 33


class _Faults(Refinement):
    """What a fault was: by its error code."""

    sizes = f"as recorded by kvm_mmio, assumed of kvm_page_fault: {ASSUMED_SIZE} bytes"

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, those of faults with their access."""
        fault = rows[:, p.TAG] == _FAULT
        code = rows[fault, A]
        intel = (code & _GLA_VALID != 0) & (code & _NESTED == 0)
        fetch = code & np.where(intel, _FETCH, _CODE_FETCH) != 0
        access = np.where(fetch, acc.EXECUTE, acc.READ)
        rows[fault, ACCESS] = np.where(code & _WRITE != 0, acc.WRITE, access)
        return rows


def _event(name: str, *, first: bool) -> tuple[Parts, ...]:
    """Up to the fields of an event, with the time stamp before it, and the vCPU that QEMU names its threads by.

    It is the ``first`` word with ``kvm_`` in a line, unless the command has that, too.
    """
    vcpu = maybe(start(), spaces(0), text("CPU "), decimal(VCPU), text("/KVM"))
    time = maybe(start(), stamp(TIME))
    is_it = (until("kvm_"), text(f"{name}: ")) if first else (until(f"{name}: "),)
    return (*is_it, *vcpu, *time, until(f"{name}: "), text(f"{name}: "), spaces(0))


def _mmio(*, first: bool) -> Line:
    return record(
        "… kvm_mmio: mmio write|read len N gpa 0xADDRESS val 0xVALUE",
        *_event("kvm_mmio", first=first),
        *(text("mmio "), choice(ACCESS, write=acc.WRITE, read=acc.READ), sure(), text(" len "), decimal(SIZE)),
        *(text(" gpa "), hexadecimal(ADDRESS), text(" val "), hexadecimal(VALUE), constant(VALUED, 1)),
    )


def _page_fault(*, first: bool) -> Line:
    return record(
        "… kvm_page_fault: vcpu N rip 0xRIP address 0xADDRESS error_code 0xCODE",
        *_event("kvm_page_fault", first=first),
        sure(),
        maybe(text("vcpu "), decimal(VCPU), spaces(1)),
        maybe(text("rip "), hexadecimal(PC), spaces(1)),
        *(text("address "), hexadecimal(ADDRESS), text(" error_code "), hexadecimal(A), constant(SIZE, ASSUMED_SIZE)),
        maybe(text(","), rest()),
        tag=_FAULT,
    )


# Other events that KVM has many of.
_FREQUENT = ("entry", "userspace_exit", "pio", "msr", "cr", "apic", "inj_virq", "eoi", "cpuid", "fpu", "ack_irq")
_OTHER = "event other than kvm_mmio and kvm_page_fault"
EXITS = "kvm_exit has no address of memory: record the events kvm_mmio and kvm_page_fault, too"
PAGE_FAULTS = "page_fault_user and page_fault_kernel have virtual addresses: `perf script` of exceptions:* is read"

FTRACE = ToolFormat(
    name="ftrace",
    tool="Linux' event tracing of KVM: tracefs, trace-cmd report, perf script",
    made="trace-cmd record -e kvm:kvm_mmio -e kvm:kvm_page_fault; trace-cmd report > trace.txt",
    address="guest-physical",
    reads="kvm_mmio `read`; kvm_page_fault whose error code is of a read",
    writes="kvm_mmio `write`; kvm_page_fault whose error code is of a write",
    executes="kvm_page_fault whose error code is of a fetch",
    columns=("gpa", "size", "access", "vcpu", "pc", "time", "value"),
    mark=re.compile(
        rb"^(?:# tracer: |cpus=\d+\r?$|.{0,200}?\bkvm_(?:mmio: mmio |page_fault: |exit: |entry: |userspace_exit: ))",
        re.MULTILINE,
    ),
    lines=(
        _page_fault(first=True),
        _mmio(first=True),
        skip(EXITS, until("kvm_"), text("kvm_exit: ")),
        skip("unsatisfied-read: the read follows when it is answered", until("kvm_mmio: "), until("mmio unsatisfied-")),
        skip(_OTHER, until("kvm_"), text("kvm_"), choice_of(A, dict.fromkeys(_FREQUENT, 0)), text(": ")),
        _page_fault(first=False),
        _mmio(first=False),
        skip(EXITS, until("kvm_exit: ")),
        skip(PAGE_FAULTS, until(": page_fault_"), text(": page_fault_")),
        skip("comment", text("#")),
        skip(_OTHER, until(" ["), text(" ["), decimal(A), text("]"), until(": ")),
        skip(_OTHER, stamp(TIME)),
        skip("number of processors", text("cpus="), decimal(A)),
        skip("version of the trace", text("version = ")),
        skip("lost events", text("CPU:"), decimal(A), text(" [LOST ")),
        skip("empty buffer", text("CPU "), decimal(A), text(" is empty")),
        skip("call chain", spaces(0), text("=>")),
        skip("call chain", text("<stack trace")),
    ),
    refine=_Faults,
)
