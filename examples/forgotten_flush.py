"""A guest that forgets one flush: a processor goes on writing to the page that it no longer owns, and is found out.

Two vCPUs share page tables. The guest gives a linear page another frame and flushes twice: once for the wrong processor
(the VP index is not the vCPU id), once for the right one. First step by step, then as a recorded trace: one call finds
the write and says which flush missed it.

Run: `.venv/bin/python examples/forgotten_flush.py [URL]`; without a URL it starts a service of its own.
"""

import sys
from typing import Any

from connect import connect

import subpage

PAGE = 0x1000
TABLES, OLD_FRAME, NEW_FRAME = 0x100000, 0x11000, 0x12000
LINEAR = 0x7F0000001000
GUEST_OS_ID = {"index": "0x40000000", "value": "0x8100000000000000"}
CPUID = [{"function": "0x40000001", "eax": "0x31237648"}, {"function": "0x40000004", "eax": "0x804"}]


class Guest:
    """A VM whose vCPU 1 has VP index 5."""

    def __init__(self, client: subpage.Client) -> None:
        vcpus = [{"id": 0, "cpuid": CPUID}, {"id": 1, "vp_index": 5, "cpuid": CPUID}]
        self.vm = client.create_vm(memory="16MiB", vcpus=vcpus, translation_cache="model", flush_policy="tlfs")
        self.vm.call("putMsrs", path={"n": 0}, json={"msrs": [GUEST_OS_ID]})
        for level in range(3):
            table = TABLES + level * PAGE
            self.store(table + 8 * (LINEAR >> (39 - 9 * level) & 511), table + PAGE | 0x67)
        for vcpu in (0, 1):
            self.vm.call("putVmcs", path={"n": vcpu}, json={"cr3": hex(TABLES)})

    def store(self, gpa: int, word: int) -> None:
        self.vm.write_memory(gpa, word.to_bytes(8, "little"))

    def map(self, frame: int) -> None:
        self.store(TABLES + 3 * PAGE + 8 * (LINEAR >> 12 & 511), frame | 0x67)

    def write(self, vcpu: int) -> tuple[str, bool]:
        done = self.vm.access(gva=hex(LINEAR), vcpu=vcpu, data=bytes(8))
        return done["gpa"], done["stale"]

    def flush(self, mask: int) -> subpage.Document:
        call = {"name": "HvCallFlushVirtualAddressList", "address_space": hex(TABLES), "processor_mask": mask}
        return self.vm.hypercall(0, call={**call, "ranges": [hex(LINEAR)]}, input_gpa="0x5000")


def recorded_write(vcpu: int, frame: int) -> dict[str, Any]:
    """A write as a tracer sees it: where it was, and where the page tables said that it goes."""
    return {"vcpu": vcpu, "gva": hex(LINEAR), "gpa": hex(frame), "address_space": hex(TABLES)}


def recorded_flush(mask: int) -> dict[str, Any]:
    """The hypercall of vCPU 0: RCX, RDX, R8, then its block: address space, flags, processors, one range."""
    words = (0x1_0000_0003, 0x5000, 0, TABLES, 0, mask, LINEAR)
    return {"op": 1, "vcpu": 0, "arg": b"".join(word.to_bytes(8, "little") for word in words).hex()}


def replay_it(guest: Guest) -> None:
    """The same as one trace: a flush is missing between records 1 and 3."""
    trace = [recorded_write(1, OLD_FRAME), recorded_flush(1 << 1), recorded_write(0, NEW_FRAME)]
    trace += [recorded_write(1, NEW_FRAME), recorded_flush(1 << 5), recorded_write(1, NEW_FRAME)]
    guest.flush(1 << 5 | 1)
    result = guest.vm.replay(trace)
    assert result["stale_translations"] == 1
    (stale,) = result["stale_records"]
    assert (stale["index"], stale["cached_gpa"], stale["gpa"]) == (3, hex(OLD_FRAME), hex(NEW_FRAME))
    assert stale["missed_by"]["index"] == 1
    print(f"record {stale['index']} of the trace wrote to {stale['cached_gpa']} instead of {stale['gpa']}")
    print(stale["explanation"])


def main(url: str | None) -> None:
    with connect(url) as client:
        guest = Guest(client)
        guest.map(OLD_FRAME)
        print(f"vCPU 1 writes to {guest.write(1)[0]}")
        guest.map(NEW_FRAME)
        for mask, found in ((1 << 1, (hex(OLD_FRAME), True)), (1 << 5, (hex(NEW_FRAME), False))):
            flush = guest.flush(mask)
            gpa, stale = guest.write(1)
            assert (gpa, stale) == found
            dropped = sum(len(vp["dropped"]) for vp in flush["vps"])
            print(f"flush of VPs {mask:#b}: targets {flush['targeted']}, {dropped} translations dropped")
            print(f"vCPU 1 writes to {gpa}: {'a stale translation, the flush missed VP 5' if stale else 'as mapped'}")
        replay_it(guest)
        guest.vm.delete()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
