"""The main job with the generated client: a machine, an object to protect, a trace, what would have exited.

    python drive.py URL TOKEN TRACE.parquet

The file has the trace that is sent as JSON too. Asserts what it expects and prints the figures as JSON. Only the
client's own types are used: mypy checks the contract.
"""

from __future__ import annotations

import io
import json
import struct
import sys
from pathlib import Path

from subpage_client import AuthenticatedClient
from subpage_client.api.guest_memory import read_memory
from subpage_client.api.protections import create_protection, list_protections
from subpage_client.api.traces import create_trace, get_exits, get_trace
from subpage_client.api.vms import create_vm, delete_vm, get_vm
from subpage_client.models import (
    AccessRecord,
    CreateTraceOnViolation,
    CreateTraceRecordType0,
    ExitPage,
    NumberedSlotRequest,
    ObjectRequest,
    OperationRecord,
    Problem,
    Protection,
    ProtectionPage,
    ProtectionRequest,
    TraceBody,
    TraceResult,
    Vm,
    VmRequest,
)
from subpage_client.types import File

TABLE, TABLE_SIZE = 0x2000360, 3616


def main(url: str, token: str, parquet: str) -> dict[str, int]:
    with AuthenticatedClient(base_url=url, token=token, raise_on_unexpected_status=True) as client:
        slot = NumberedSlotRequest(slot=0, gpa=0, size="0x40000000")
        made = create_vm.sync(client=client, body=VmRequest(name="generated", vcpus=2, spp=True, memory_slots=[slot]))
        assert isinstance(made, Vm) and made.spp and len(made.vcpus) == 2 and made.memory_slots[0].size == "0x40000000"
        assert made.host.hyperv is None and made.created.tzinfo is not None
        vm = made.id

        wanted = ProtectionRequest(
            name="kernel", objects=[ObjectRequest(name="sys_call_table", gpa=TABLE, size=TABLE_SIZE)]
        )
        protected = create_protection.sync(vm, client=client, body=wanted)
        assert isinstance(protected, Protection) and protected.objects[0].gpa == hex(TABLE)
        again = create_protection.sync(vm, client=client, body=wanted)
        assert isinstance(again, Problem) and again.status == 409
        listed = list_protections.sync(vm, client=client)
        assert isinstance(listed, ProtectionPage) and [item.name for item in listed.protections] == ["kernel"]

        # Into the object, beside it in the same 128 bytes, elsewhere in its page, and into another page.
        gpas = [TABLE, TABLE - 0x40, TABLE - 0x300, 0x1000]
        records: list[AccessRecord | OperationRecord] = [
            AccessRecord(gpa=gpa, vcpu=number % 2) for number, gpa in enumerate(gpas)
        ]
        result = create_trace.sync(vm, client=client, body=TraceBody(accesses=records))
        assert isinstance(result, TraceResult), result
        assert (result.records, result.violations, result.page_granular_violations) == (4, 2, 3)
        table = result.by_object["sys_call_table"]
        assert (table.violations, table.collateral) == (2, 1)

        page = get_exits.sync(vm, result.id, client=client)
        assert isinstance(page, ExitPage) and page.next_ is None
        assert [record.gpa for record in page.exit_records] == [hex(gpa) for gpa in gpas[:2]]
        assert {record.name for record in page.exit_records} == {"EPT violation"}, page.exit_records
        assert page.exit_records[0].gva is None and page.exit_records[0].objects == ["sys_call_table"]

        # The same as bytes, up to the first that is refused.
        packed = create_trace.sync(
            vm,
            client=client,
            body=File(payload=io.BytesIO(struct.pack("<4Q", *reversed(gpas)))),
            record=CreateTraceRecordType0.GPA8,
            on_violation=CreateTraceOnViolation.STOP,
        )
        assert isinstance(packed, TraceResult) and packed.stopped_at == 2, packed
        kept = get_trace.sync(vm, packed.id, client=client)
        assert kept == packed

        # The same as a file of columns.
        with Path(parquet).open("rb") as file:
            columns = create_trace.sync(
                vm, client=client, body=File(payload=file, mime_type="application/vnd.apache.parquet")
            )
        assert isinstance(columns, TraceResult) and columns.by_object == result.by_object, columns
        assert (columns.records, columns.violations) == (result.records, result.violations)

        content = read_memory.sync(vm, client=client, gpa=hex(TABLE), size=16)
        assert isinstance(content, File) and content.payload.read() == bytes(16)

        deleted = delete_vm.sync_detailed(vm, client=client)
        assert deleted.status_code == 204, deleted
        gone = get_vm.sync(vm, client=client)
        assert isinstance(gone, Problem) and gone.status == 404 and gone.field == "vm"
        return {"records": result.records, "violations": result.violations, "page": result.page_granular_violations}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
