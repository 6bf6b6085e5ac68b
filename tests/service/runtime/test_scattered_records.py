"""Records over frames that are no neighbours, in the store and back: their exits name the same objects."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from engine.trace.results import Untranslated
from engine.trace.session import ReplayOptions
from service.runtime import trace_records, traces
from service.runtime.traces import Trace, TraceRequest
from tests.engine import builders as b
from tests.support.guest_pages import MODES, GuestPages, K, M

AT = 0xC100_0000


@pytest.mark.parametrize("part", [1, 2, 100])
def test_scattered_records_come_back(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "PART", part)
    monkeypatch.setattr(trace_records, "PART", part)
    vm, pages = b.machine(), GuestPages(MODES["4-level"], 2 * M)
    for position, gpa in enumerate((1 * M, 3 * M, 1 * M + 8 * K)):
        pages.map(AT + position * 4 * K, gpa)
    pages.store(vm.write_memory)
    b.edit(vm, pages.load)
    vm.protect("near", [b.ProtectedObject("near", 1 * M + 0xF80, 128)])
    vm.protect("far", [b.ProtectedObject("far", 3 * M, 8)])
    rows = [(AT + 0xF80, 8), (AT + 0xFFC, 8), 0x1000, (AT + 0x1000, 8), (AT + 0xFFC, 0x1008)]
    with vm.replay(ReplayOptions(address="gva")) as run:
        run.feed(b.chunk(rows))
        result = run.finish()
    assert result.exit_columns.objects() == [["near"], ["near", "far"], ["far"], ["near", "far"]]
    request = TraceRequest("packed", "record16", (), "skip", "violations", 0, 100, address="gva")
    trace = Trace("tr_0", 1, request, result, (), datetime.now(UTC), 0.5, len(result.exit_columns))
    record = trace_records.record_of(trace)
    known = trace_records.trace_of(record)
    assert known.request == request
    assert known.result.untranslated_records == (Untranslated(2, 0x1000, 3),) and known.result.untranslated == 1
    columns = trace_records.columns_of(record, record.parts)
    assert columns.objects() == result.exit_columns.objects()
    assert columns[1:3].objects() == [["near", "far"], ["far"]]
    assert columns[np.array([3, 0])].objects() == [["near", "far"], ["near"]]
    assert replace(columns, scattered=result.exit_columns.scattered).objects() == columns.objects()
