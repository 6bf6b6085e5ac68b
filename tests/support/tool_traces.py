"""Random traces as tools would write them: one writer for each format of the table.

A writer takes accesses, writes those things of them that its format has, and says what a reader must find: the records,
as mappings from the names of columns to values.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from engine.arch import access as acc


class Access(NamedTuple):
    """One access; ``value`` is what was read or written."""

    gpa: int
    size: int
    access: int
    modifies: bool
    vcpu: int
    gva: int
    pc: int
    time: int
    value: int


class Written(NamedTuple):
    """A body, and the records that are in it."""

    body: bytes
    records: list[dict[str, int]]


Writer = Callable[[Sequence[Access]], Written]


def random_accesses(seed: int, count: int) -> list[Access]:
    """Accesses of every kind, at addresses of up to 52 bits and instructions of up to 64."""
    rng = random.Random(seed)
    time = 0
    found = []
    for _ in range(count):
        time += rng.choice((0, 1, 1_000, rng.randrange(1 << 40)))
        access = rng.choice((acc.READ, acc.WRITE, acc.WRITE, acc.EXECUTE))
        size = rng.choice((1, 2, 4, 8, 8, 16, 64, rng.randrange(1, 1 << 16)))
        found.append(
            Access(
                gpa=rng.randrange(1 << rng.choice((12, 32, 52))),
                size=size,
                access=access,
                modifies=access == acc.WRITE and rng.random() < 0.2,
                vcpu=rng.randrange(4),
                gva=rng.randrange(1 << 64),
                pc=rng.randrange(1 << rng.choice((32, 64))),
                time=time,
                value=rng.randrange(1 << 8 * min(size, 8)),
            )
        )
    return found


def lackey(accesses: Sequence[Access]) -> Written:
    """Each access after its instruction, which is an access of its own; an execution is an instruction."""
    lines = ["==4242== Lackey, an example Valgrind tool"]
    records = []
    for one in accesses:
        pc = one.gpa if one.access == acc.EXECUTE else one.pc
        lines.append(f"I  {pc:08x},{one.size}")
        records.append({"gpa": pc, "size": one.size, "access": acc.EXECUTE, "kind": acc.DATA, "pc": pc})
        if one.access == acc.EXECUTE:
            continue
        letter = "M" if one.modifies else "L" if one.access == acc.READ else "S"
        kind = acc.READ_MODIFY_WRITE if one.modifies else acc.DATA
        lines.append(f" {letter} {one.gpa:08x},{one.size}")
        records.append({"gpa": one.gpa, "size": one.size, "access": one.access, "kind": kind, "pc": pc})
    return Written("\n".join([*lines, ""]).encode(), records)


def drmemtrace(accesses: Sequence[Access]) -> Written:
    """The view of one thread, with a marker of the time before each access."""
    lines = ["Output format:", "<--record#-> <--instr#->: <---tid---> <record details>", "-" * 60]
    records = []
    for number, one in enumerate(accesses):
        prefix = f"{2 * number + 1:12} {number:11}: {4242:11} "
        lines.append(f"{prefix}<marker: timestamp {one.time // 1000}>")
        if one.access == acc.EXECUTE:
            pc = one.gpa
            lines.append(
                f"{prefix}ifetch      {one.size:2} byte(s) @ 0x{pc:016x} 48 89 04 d1   mov    %rax, (%rcx,%rdx,8)"
            )
        else:
            pc = one.pc
            name = "write" if one.access == acc.WRITE else "read"
            lines.append(f"{prefix}{name:<12}{one.size:2} byte(s) @ 0x{one.gpa:016x} by PC 0x{pc:016x}")
        time = one.time // 1000 * 1000
        record = {"gpa": one.gpa, "size": one.size, "access": one.access, "gva": one.gpa, "pc": pc, "time": time}
        records.append(record)
    return Written("\n".join([*lines, "View tool results:", "   60 : total instructions", ""]).encode(), records)


def execlog(accesses: Sequence[Access]) -> Written:
    """System emulation, up to three accesses an instruction, every other instruction with its opcode."""
    lines, records = [], []
    data = [one for one in accesses if one.access != acc.EXECUTE]
    for number in range(0, len(data), 3):
        some = data[number : number + 3]
        pc, vcpu = some[0].pc, some[0].vcpu
        opcode = "0xf8012400, " if number % 2 else ""
        done = "".join(f", {'store' if one.access else 'load'}, 0x{one.gpa:08x}, RAM" for one in some)
        lines += [
            f'{vcpu}, 0x{pc:x}, {opcode}"movq %rax, 8(%rdi, %rcx)"{done}',
            f'{vcpu}, 0x{pc + 4:x}, {opcode}"nop "',
        ]
        records += [{"gpa": one.gpa, "access": one.access, "vcpu": vcpu, "pc": pc} for one in some]
    return Written("\n".join([*lines, ""]).encode(), records)


def _bochs_data(one: Access) -> str:
    """What Bochs prints of data: 32-bit words, the highest first; bytes, if it is not so many of them."""
    if one.size not in (1, 2, 4, 8, 16, 32, 64):
        return "".join(f" {byte:02x}" for byte in one.value.to_bytes(8, "big"))
    if one.size <= 4:
        return f": 0x{one.value:0{2 * one.size}X}"
    words = one.value.to_bytes(one.size, "big")
    return ":" + "".join(f" 0x{words[at : at + 4].hex().upper()}" for at in range(0, one.size, 4))


def bochs(accesses: Sequence[Access]) -> Written:
    """A read-modify-write is a read and a write."""
    lines, records = [], []
    for one in accesses:
        physical = f"PHY 0x{one.gpa:012x} (len={one.size}, WB){_bochs_data(one)}"
        linear = f"LIN 0x{one.gva:016x} {physical}"
        names = {acc.READ: "RD", acc.WRITE: "WR", acc.EXECUTE: "EX"}
        record = {"gpa": one.gpa, "size": one.size, "vcpu": one.vcpu, "gva": one.gva, "kind": acc.DATA}
        if one.modifies:
            lines += [f"[CPU{one.vcpu} RW]: {linear}", f"[CPU{one.vcpu} WR]: {physical}"]
            records += [{**record, "access": acc.READ}, {**record, "access": acc.WRITE}]
        else:
            lines.append(f"[CPU{one.vcpu} {names[one.access]}]: {linear}")
            records.append({**record, "access": one.access})
    return Written("\n".join([*lines, "<bochs:3> quit", ""]).encode(), records)


def gem5(accesses: Sequence[Access]) -> Written:
    """What reaches a memory, between instructions."""
    lines, records = [], []
    for one in accesses:
        label = "Read/Write" if one.modifies else ("Read", "Write", "IFetch")[one.access]
        tick = f"{one.time * 1000 + 999:7}: "
        name = f"system.cpu{one.vcpu}"
        lines.append(
            f"{tick}{name}: A0 T0 : {one.pc:#x} @main+4 : mov   [rcx + 8*rdx], rax : MemWrite :  D=0x0 A={one.gva:#x}"
        )
        data = f" data {one.value:#x}" if one.size in (1, 2, 4, 8) else ""
        lines.append(
            f"{tick}system.physmem: {label} from {name}.data of size {one.size} on address {one.gpa:#x}{data} C"
        )
        kind = acc.READ_MODIFY_WRITE if one.modifies else acc.DATA
        record = {"gpa": one.gpa, "size": one.size, "access": one.access, "kind": kind, "vcpu": one.vcpu}
        records.append({**record, "pc": 0, "time": one.time})
    return Written("\n".join([*lines, ""]).encode(), records)


def ftrace(accesses: Sequence[Access]) -> Written:
    """Accesses of 1, 2, 4 and 8 bytes as MMIO, others as faults, each after its exit."""
    lines, records = ["# tracer: nop", "#"], []
    for one in accesses:
        comm = f"CPU {one.vcpu}/KVM-4242"
        seconds = f"{one.time // 10**9}.{one.time % 10**9:09}"
        prefix = f"{comm:>23} [001] .....  {seconds}: "
        lines.append(f"{prefix}kvm_exit: vcpu {one.vcpu} reason EPT_VIOLATION rip {one.pc:#x} info1 0x182")
        record = {"gpa": one.gpa, "access": one.access, "vcpu": one.vcpu, "time": one.time}
        if one.access != acc.EXECUTE and one.size in (1, 2, 4, 8):
            name = "write" if one.access == acc.WRITE else "read"
            lines.append(f"{prefix}kvm_mmio: mmio {name} len {one.size} gpa {one.gpa:#x} val {one.value:#x}")
            records.append({**record, "size": one.size, "pc": 0})
        else:
            code = 0x180 | 1 << (0, 1, 2)[one.access]
            fault = f"vcpu {one.vcpu} rip {one.pc:#x} address 0x{one.gpa:016x} error_code {code:#x}"
            lines.append(f"{prefix}kvm_page_fault: {fault}")
            records.append({**record, "size": 8, "pc": one.pc})
    return Written("\n".join([*lines, ""]).encode(), records)


def perf_script(accesses: Sequence[Access]) -> Written:
    """Samples of loads and stores, and page faults of fetches."""
    lines, records = [], []
    for one in accesses:
        pc = one.gpa if one.access == acc.EXECUTE else one.pc
        event = ("cpu/mem-loads,ldlat=30/P", "cpu/mem-stores/P", "page-faults")[one.access]
        seconds = f"{one.time // 10**9:5}.{one.time % 10**9:09}"
        lines.append(f"{'Web Content':>16}  4242 [001] {seconds}: {1:10} {event}: {one.gpa:16x} {pc:16x}")
        records.append({"gpa": one.gpa, "access": one.access, "pc": pc, "time": one.time})
    return Written("\n".join([*lines, ""]).encode(), records)


def perf_mem(accesses: Sequence[Access]) -> Written:
    """A dump of samples with physical addresses, which are not 0."""
    lines, records = ["# PID, TID, IP, ADDR, PHYS ADDR, DATA PAGE SIZE, LOCAL WEIGHT, DSRC, SYMBOL"], []
    for one in accesses:
        source = 0x1E05080000 | (2, 4, 16)[one.access]
        where = f"{one.pc:#x},{one.gva:#x},0x{one.gpa:016x},4K"
        lines.append(f"4242,4243,{where},30,{source:#x},/usr/bin/w:std::pair<int. int>::swap")
        if one.gpa:
            records.append({"gpa": one.gpa, "access": one.access, "gva": one.gva, "pc": one.pc})
    return Written("\n".join([*lines, ""]).encode(), records)


def hyperdbg(accesses: Sequence[Access]) -> Written:
    """A line of a script each."""
    lines, records = [], []
    for number, one in enumerate(accesses):
        name = ("read", "write", "execute")[one.access]
        where = f"context (address): {one.gva:#x}, rip: {one.pc:#x}, access: {name}"
        lines.append(f"[+] {number:#x} hit, process id: 0x4, core: {one.vcpu:#x}, {where}")
        records.append({"gpa": one.gva, "access": one.access, "vcpu": one.vcpu, "pc": one.pc})
    return Written("\n".join([*lines, ""]).encode(), records)


def champsim(accesses: Sequence[Access]) -> Written:
    """An instruction each, with one address; an execution is one without."""
    body, records = b"", []
    for number, one in enumerate(accesses):
        pc, gpa = one.pc or 1, one.gpa or 8
        memory = [0] * 6
        if one.access != acc.EXECUTE:
            memory[2 + number % 4 if one.access == acc.READ else number % 2] = gpa
            records.append({"gpa": gpa, "size": 8, "access": one.access, "pc": pc})
        body += struct.pack("<Q8B6Q", pc, 0, 0, 1, 0, 2, 0, 0, 0, *memory)
    return Written(body, records)


def csv(accesses: Sequence[Access]) -> Written:
    """All columns of a record, in hexadecimal where that is usual."""
    lines = ["gpa,size,access,kind,vcpu,gva,pc,time,note"]
    records = []
    for one in accesses:
        kind = int(one.modifies)
        named = ("read", "W", "2")[one.access]
        lines.append(f"{one.gpa:#x},{one.size},{named},{kind},{one.vcpu},{one.gva},{one.pc:#X},{one.time},x")
        records.append({**one._asdict(), "kind": kind})
    return Written("\n".join([*lines, ""]).encode(), records)


WRITERS: Mapping[str, Writer] = {
    "lackey": lackey,
    "drmemtrace": drmemtrace,
    "execlog": execlog,
    "bochs": bochs,
    "gem5": gem5,
    "ftrace": ftrace,
    "perf-script": perf_script,
    "perf-mem": perf_mem,
    "hyperdbg": hyperdbg,
    "champsim": champsim,
    "csv": csv,
}
