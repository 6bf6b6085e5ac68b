# ruff: noqa: E501 - lines of tools are as long as they are
"""Lines of tools as they come: with what may be missing, in the layouts of several versions, cut and foreign.

What a line says is worked out from the tool's own print statement, not from what the reader makes of it.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.readers import open_trace

R, W, X = acc.READ, acc.WRITE, acc.EXECUTE
COMMENTS = "# tracer: nop\n#\n"


def read(format: str, body: str) -> tuple[list[dict[str, int]], Any]:
    """The records with what a record has of columns, and what the body was taken for."""
    reader = open_trace(format, io.BytesIO(body.encode()))
    found = []
    for chunk in reader:
        for at, (gpa, word) in enumerate(chunk.records.tolist()):
            record = {"gpa": gpa, "size": word & 0xFFFF, "access": word >> 16 & 0xFF, "vcpu": word >> 32 & 0xFFFF}
            record["kind"] = word >> acc.RECORD_KIND_SHIFT & 7
            record["linear"] = (word >> acc.RECORD_LINEAR_SHIFT & acc.LINEAR_BITS) ^ acc.LINEAR_VALID
            record |= {name: int(values[at]) for name, values in chunk.carry.items() if name in ("pc", "time")}
            record |= {} if chunk.gva is None else {"gva": int(chunk.gva[at])}
            found.append(record)
    return found, reader.taken


KVM_MMIO = "kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0"
MMIO = {"gpa": 0xFEE000B0, "size": 4, "access": W, "pc": 0}

# Lines that give one record, and columns of it.
LINES: list[tuple[str, str, dict[str, int]]] = [
    ("ftrace", f"  CPU 3/KVM-4242    [001] .....  1204.000704: {KVM_MMIO}", {**MMIO, "vcpu": 3, "time": 1204000704000}),
    ("ftrace", f"      tiny-4242    [001] d..1.  1204.000704: {KVM_MMIO}", {**MMIO, "vcpu": 0, "time": 1204000704000}),
    ("ftrace", f"     <...>-4242    [111] D.h31  0.5: {KVM_MMIO}", {**MMIO, "time": 500000000}),
    ("ftrace", f"  a b [x]-4242    ( 4242) [001] .....  7.000000001: {KVM_MMIO}", {**MMIO, "time": 7000000001}),
    ("ftrace", f"  a-b-4242    (-------) [001] .....  7.000001: {KVM_MMIO}", {**MMIO, "time": 7000001000}),
    ("ftrace", f" CPU 12/KVM-7 [003]  1204.000704123: {KVM_MMIO.replace(' mmio', '             mmio')}", {**MMIO, "vcpu": 12}),
    ("ftrace", f"CPU 2/KVM  4242 [001]  1204.000704: kvm:{KVM_MMIO}", {**MMIO, "vcpu": 2, "time": 1204000704000}),
    ("ftrace", f"  tiny-4242    1..... 1204.000704: {KVM_MMIO}", {**MMIO, "time": 1204000704000}),
    ("ftrace", f"  tiny-4242    [001] ..... 9987123123: {KVM_MMIO}", {**MMIO, "time": 0}),
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio read len 2 gpa 0x9000 val 0xffff", {"gpa": 0x9000, "size": 2, "access": R}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: address 2a5c6a0 error_code 182", {"gpa": 0x2A5C6A0, "access": W, "pc": 0}),
    (
        "ftrace",
        "CPU 0/KVM-1 [0] . 1.0: kvm_page_fault: vcpu 5 rip 0xffffffff81123456 address 0x2a5c6a8 error_code 181",
        {"gpa": 0x2A5C6A8, "size": 8, "access": R, "vcpu": 5, "pc": 0xFFFFFFFF81123456},
    ),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x184", {"access": X}),
    # Read, fetch and write by page-fault error codes of AMD, with and without what nested paging adds.
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x100000004", {"access": R}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x100000014", {"access": X}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x200000006", {"access": W}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: address 1000 error_code 4", {"access": R}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: address 1000 error_code 14", {"access": X}),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x182, seq = 0x1", {"access": W}),
    ("execlog", '0, 0xa14, 0xf87f42b4, "cmp r4, r6", store, 0x200000e4, RAM', {"gpa": 0x200000E4, "access": W, "pc": 0xA14}),
    ("execlog", '11, 0x7c21, "incl 0x5000", load, 0x00005000, RAM', {"gpa": 0x5000, "size": 8, "access": R, "vcpu": 11}),
    ("execlog", '0, 0x7c21, "movl %eax, (%rdi)", store, 0xfee000b0, kvm-apic-msi', {"gpa": 0xFEE000B0, "access": W}),
    ("execlog", '0, 0x7c21, "movl %eax, (%rdi)", store, 0x5000, RAM, rax -> 0x0000000000000001', {"gpa": 0x5000, "access": W}),
    ("execlog", '0, 0x401624, "movq %rax, (%rdi)", store, 0x004a9000', {"gpa": 0x4A9000, "access": W, "pc": 0x401624}),
    ("execlog", '0, 0x401624, "movq %rax, (%rdi)", store, 0x004a9000, rax -> 0x01, rbx -> 0x02', {"gpa": 0x4A9000}),
    (
        "bochs",
        "[CPU1 WR]: LIN 0xffffffff82000000 PHY 0x0000000000002000000 (len=8, WB): 0x00000001 0x0000005A",
        {"gpa": 0x2000000, "size": 8, "access": W, "vcpu": 1, "gva": 0xFFFFFFFF82000000, "linear": 1, "kind": acc.DATA},
    ),
    ("bochs", "<bochs:2> [CPU0 RD]: LIN 0x00004000 PHY 0x00004000 (len=2, pl=3): 0x005A", {"gpa": 0x4000, "access": R, "size": 2}),
    ("bochs", "[CPU0 RD]: LIN 0x4000 PHY 0x5000 (len=16, WB): 0x1 0x2 0x3 0x4", {"gpa": 0x5000, "size": 16, "gva": 0x4000}),
    ("bochs", "[CPU0 WR]: LIN 0x4000 PHY 0x5000 (len=3, UC) 01 02 03", {"gpa": 0x5000, "size": 3, "access": W}),
    ("bochs", "[CPU0 EX]: LIN 0x4000 PHY 0x5000 (len=3, UC) 01 02 03", {"gpa": 0x5000, "access": X}),
    ("bochs", "[CPU0 RD]: PHY 0x0000000000001000 (len=8, WB): 0x00000000 0x00002067\t; PML4E", {"access": R, "kind": acc.PAGING_READ}),
    ("bochs", "[CPU0 WR]: PHY 0x0000000000001000 (len=8, WB): 0x00000000 0x00002067\t; PTE", {"access": W, "kind": acc.PAGING_UPDATE}),
    ("bochs", "[CPU0 RD]: PHY 0x1000 (len=4, WB): 0x00002067\t; VMCS", {"gpa": 0x1000, "access": R, "kind": 0, "linear": 0}),
    ("bochs", "[CPU0 WR]: PHY 0x000000005000 (len=4, UC): 0x00001235", {"gpa": 0x5000, "access": W, "gva": 0, "linear": 0}),
    ("bochs", "[CPU0 SW]: LIN 0x4000 PHY 0x5000 (len=8, WB): 0x0 0x1", {"access": W, "kind": acc.SHADOW_STACK}),
    ("bochs", "[CPU0 SRW]: LIN 0x4000 PHY 0x5000 (len=8, WB): 0x0 0x1", {"access": R, "kind": acc.SHADOW_STACK}),
    (
        "gem5",
        "  77000: system.physmem: Write of size 8 on address 0x299000 data 0x4d C",
        {"gpa": 0x299000, "size": 8, "access": W, "time": 77, "vcpu": 0, "kind": 0},
    ),
    (
        "gem5",
        "77999: system.mem_ctrls0.dram: Read from system.cpu3.dcache of size 64 on address 0x299000 C",
        {"gpa": 0x299000, "size": 64, "access": R, "time": 77, "vcpu": 3},
    ),
    ("gem5", "1000: MemoryAccess: board.memory.mem: IFetch from board.processor.cores1.core of size 4 on address 0x10 data 0x1 U", {"access": X, "vcpu": 1}),
    ("gem5", "system.physmem: Read/Write from system.cpu.data of size 4 on address 0x10 data 0x1 U", {"access": W, "kind": 1, "time": 0}),
    (
        "gem5",
        "25007500: system.cpu1: A12 T0 : 0xffffff8008080000 @start_kernel+4.1  :   strxi_uop   x29, [ureg0] : MemWrite :  D=0x0000000000000000 A=0xffffff8008913f90",
        {"gpa": 0xFFFFFF8008913F90, "size": 8, "access": W, "vcpu": 1, "pc": 0xFFFFFF8008080000, "time": 25007},
    ),
    (
        "gem5",
        "25007500: system.cpu T0 : @start_kernel.1  :   strxi_uop   x29, [ureg0] : MemRead :  D=0x0 A=0xffffff8008913f90  FetchSeq=12  CPSeq=11  flags=(IsLoad)",
        {"gpa": 0xFFFFFF8008913F90, "access": R, "pc": 0},
    ),
    ("gem5", "1: system.cpu: T0 : 0x10    : fld : FloatMemRead :  D=0x0 A=0x20", {"gpa": 0x20, "access": R}),
    ("gem5", "1: system.cpu: T0 : 0x10    : vse : SimdUnitStrideStore :  D=[0_0] A=0x20", {"gpa": 0x20, "access": W}),
    (
        "drmemtrace",
        "           6           1:        4242 write        8 byte(s) @ 0x00000000004a9000 by PC 0x0000000000401624",
        {"gpa": 0x4A9000, "size": 8, "access": W, "pc": 0x401624, "gva": 0x4A9000},
    ),
    ("drmemtrace", "6 1: W0.T4242 read        32 byte(s) @ 0x4a9000 by PC 0x401624", {"size": 32, "access": R}),
    ("drmemtrace", "  6  1:  4242 ifetch       4 byte(s) @ 0x0000000000401624 48 89 04 d1          mov    %rax, (%rcx)", {"gpa": 0x401624, "access": X, "pc": 0x401624}),
    ("drmemtrace", "  6  1:  4242 ifetch       2 byte(s) @ 0x401624 taken conditional jump", {"access": X, "size": 2}),
    ("drmemtrace", "   173371: T1774669 write        8 byte(s) @ 0x00004a9000 by PC 0x401624", {"gpa": 0x4A9000, "pc": 0x401624}),
    ("drmemtrace", "T4242 write 8 byte(s) @ 0x4a9000 by PC 0x401624", {"gpa": 0x4A9000, "access": W}),
    ("perf-script", "               w  4242 1132.196672: page-faults:           4a6270 ffffffff817554ea", {"gpa": 0x4A6270, "access": W, "size": 8, "pc": 0xFFFFFFFF817554EA, "time": 1132196672000}),
    ("perf-script", "               w  4242 1132.196715: page-faults:           4014f0           4014f0", {"access": X}),
    ("perf-script", "     Web Content  4242/4243  [001] 1132.196715123:          1 page-faults:u:           4014f0           401400", {"time": 1132196715123, "access": W, "pc": 0x401400}),
    ("perf-script", "  554 page-faults:     7ffcd0f955e9", {"gpa": 0x7FFCD0F955E9, "access": W, "pc": 0, "time": 0}),
    ("perf-script", "true  3004 37634.644574: page-faults:     7f8283c84b70 _start     7f8283c84b00 _start               0 N/A", {"gpa": 0x7F8283C84B70, "pc": 0}),
    ("perf-script", "true  3004 37634.644574: page-faults:     7f8283c84b70     7f8283c84b00 _start+0x0 (/usr/lib/ld.so)", {"gpa": 0x7F8283C84B70, "pc": 0x7F8283C84B00}),
    ("perf-script", "true  3004 37634.644574: page-faults:     7f8283c84b70               0     7f8283c84b70", {"gpa": 0x7F8283C84B70, "pc": 0}),
    ("perf-script", " 3004 page-faults:     7f8283c84b70      1e05080021 |OP N/A|LVL N/A or N/A|SNP N/A|TLB N/A|LCK N/A|BLK  N/A               0     7f8283c84b70", {"gpa": 0x7F8283C84B70, "access": W, "pc": 0}),
    ("perf-script", "w 42 1.0: cpu/mem-loads,ldlat=30/P:     7f8283c84b70     7f8283c84b00", {"access": R}),
    ("perf-script", "w 42 1.0: cpu/mem-stores/P:     7f8283c84b70     7f8283c84b00 page_faults_load+0x1 (w)", {"access": W, "pc": 0x7F8283C84B00}),
    ("perf-script", "w 42 1.0: mem_inst_retired.all_stores:pp:     7f8283c84b70     7f8283c84b00", {"access": W}),
    ("perf-script", "w 42 1.0: MEM_TRANS_RETIRED.LOAD_LATENCY:     7f8283c84b70     7f8283c84b00", {"access": R}),
    ("perf-script", "w 42 1.0: ibs_op//:     7f8283c84b70       68501042 |OP STORE|LVL L1 hit|SNP N/A|TLB L1 hit|LCK No|BLK  N/A 3 7f00", {"access": W}),
    ("perf-script", "w 42 1.0: memory:     7f8283c84b70       68501042 |OP LOAD|LVL L1 hit|SNP N/A|TLB L1 hit|LCK No|BLK  N/A", {"access": R}),
    ("perf-script", "w 42 [001] 1.0: exceptions:page_fault_user: address=0x4a8000 ip=0x401632 error_code=0x7", {"gpa": 0x4A8000, "access": W, "pc": 0x401632}),
    ("perf-script", "w 42 [001] 1.0: exceptions:page_fault_user: address=0x4a8000 ip=0x401632 error_code=0x4", {"access": R}),
    ("perf-script", "w 42 [001] 1.0: exceptions:page_fault_user: address=0x401632 ip=0x401632 error_code=0x14", {"access": X}),
    (
        "hyperdbg",
        "[+] 0x1 hit, process id: 0x4, core: 0xa, context (address): 0xfffff80512345680, rip: 0xfffff80511000123, access: read",
        {"gpa": 0xFFFFF80512345680, "access": R, "vcpu": 10, "pc": 0xFFFFF80511000123, "size": 8},
    ),
    ("hyperdbg", "context: fffff805`12345680 rip: fffff805`11000123", {"gpa": 0xFFFFF80512345680, "pc": 0xFFFFF80511000123, "access": W}),
    ("hyperdbg", "access: execute, rip: 0x10, context: 0X20, core: 1", {"gpa": 0x20, "pc": 0x10, "vcpu": 1, "access": X}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "line", "wanted"), LINES, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(LINES)]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line(format: str, line: str, wanted: dict[str, int], end: str) -> None:
    (found,), _ = read(format, line + end)
    assert {name: found[name] for name in wanted} == wanted


# Lines that give none, and why.
SKIPPED: list[tuple[str, str, str]] = [
    ("ftrace", "t-1 [0] . 1.0: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1 info1 0x182 info2 0x0", "kvm_exit has no address"),
    ("ftrace", "t-1 [0] . 1.0: kvm_exit: reason EPT_VIOLATION rip 0x1 info 182 0", "kvm_exit has no address"),
    ("ftrace", "kvm_run-1 [0] 1.0: kvm_exit:       reason EXIT_NPF rip 0x1 info 100000014 1000", "kvm_exit has no address"),
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio unsatisfied-read len 2 gpa 0x9000 val 0x0", "unsatisfied-read"),
    ("ftrace", "t-1 [0] . 1.0: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)", "event other than"),
    ("ftrace", "kworker/0:1-12 [000] ..... 1.0: workqueue_execute_start: work struct 0000: function x", "event other than"),
    ("ftrace", "t-1 [0] . 1.0: kvm_fast_mmio: fast mmio at gpa 0xfe003000", "event other than"),
    ("ftrace", "cpus=2", "number of processors"),
    ("ftrace", "CPU:1 [LOST 123 EVENTS]", "lost events"),
    ("ftrace", " => kvm_vcpu_ioctl", "call chain"),
    ("ftrace", "w-42 [001] d.... 1.0: page_fault_user: address=0x4a6270 ip=0x4014f0 error_code=0x6", "virtual addresses"),
    ("lackey", "==00:00:00:01.234 4242== Command: ./w", "message of Valgrind"),
    ("lackey", "SB 04016b80", "superblock"),
    ("execlog", '0, 0xa12, 0xf8012400, "movs r4, #0"', "instruction without an access"),
    ("execlog", '0, 0xa12, "movs r4, #0", r4 -> 0x00000000', "instruction without an access"),
    ("bochs", "(0).[1234] [0x000000007c00] 0000:7c00 (unk. ctxt): cli ; fa", "instruction"),
    ("bochs", "Next at t=15821460", "where the debugger stopped"),
    ("bochs", "00014040191i[BIOS  ] Booting from 0000:7c00", "message of Bochs"),
    ("bochs", "<bochs:1> c", "prompt"),
    ("gem5", "77000: system.cpu: A0 T0 : 0x401624 @main    : add   rax, rax : IntAlu :  D=0x0000000000000002", "instruction without"),
    ("gem5", "77000: system.cpu: A0 T0 : 0x401624 @main    : stp", "instruction without"),
    ("gem5", "77000: system.cpu: A0 T0 : 0x401624 @main    : ldr x0 : MemRead : Predicated False", "predicated false"),
    ("gem5", "77000: system.physmem: 00000000  4d 00 00 00 00 00 00 00   M", "other message"),
    ("gem5", "77000: system.physmem: Cache responding to 0x40: not responding", "other message"),
    ("gem5", "src/sim/simulate.cc:194: info: Entering event queue @ 0.  Starting simulation...", "other message"),
    ("gem5", "info: Entering event queue @ 0.  Starting simulation...", "other message"),
    ("drmemtrace", "  1  0: 4242 <marker: cache line size 64>", "marker"),
    ("drmemtrace", "  1  0: 4242 <thread 4242 exited>", "end of a thread"),
    ("drmemtrace", "  1  0: 4242 pref-r-L1    1 byte(s) @ 0x0000000000401624 by PC 0x0000000000401624", "prefetch"),
    ("drmemtrace", "  1  0: 4242 ifetch       2 byte(s) @ 0x0000000000401624 non-fetched instruction", "not fetched again"),
    ("drmemtrace", "       123 : total instructions", "totals"),
    ("drmemtrace", "<record#>: T<tid> <record details>", "heading"),
    ("drmemtrace", f"          94          68:      296231 {' ' * 43}00", "further bytes of an instruction"),
    ("perf-script", "\tffffffff81775b9a elf_load", "call chain"),
    ("perf-script", "# captured on    : Mon Jan  1", "heading"),
    ("perf-script", "w 42 1.0: memory:     7f8283c84b70     7f8283c84b00", "neither name nor data source"),
    ("perf-script", "w 42 1.0: cpu/mem-loads/P:  7f8 68501042 |OP PFETCH|LVL L1 hit", "prefetch"),
    ("hyperdbg", "HyperDbg> !monitor w fffff80512345680 l 100", "command of HyperDbg"),
    ("hyperdbg", '0: kHyperDbg> !monitor w 1000 l 8 script { printf("context: %llx\\n", $context); }', "command of HyperDbg"),
    ("hyperdbg", "debuggee is running...", "message of HyperDbg"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "line", "reason"), SKIPPED, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(SKIPPED)]
)
def test_a_line_that_is_skipped(format: str, line: str, reason: str) -> None:
    found, taken = read(format, line + "\n")
    assert found == []
    assert list(taken.skipped.values()) == [1] and reason in next(iter(taken.skipped))


# Lines that are refused: cut in half, or with a number that is too wide.
REFUSED: list[tuple[str, str, str]] = [
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio write len 4 gpa 0xfee0", "the line is not whole"),
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio write len 4 gpa 0x1fee00000000000000 val 0x0", "more than 64 bits"),
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio write len 0 gpa 0x1000 val 0x0", "size must be from 1"),
    ("ftrace", "t-1 [0] . 1.0: kvm_mmio: mmio write len 65536 gpa 0x1000 val 0x0", "size must be from 1"),
    ("ftrace", "t-1 [0] . 1.0: kvm_page_fault: vcpu 0 rip 0x1 addr", "the line is not whole"),
    ("execlog", '0, 0x7c21, "incl 0x5000", load, 0x', "the line is not whole"),
    ("execlog", '0, 0x7c21, "incl 0x5', "the line is none of execlog"),
    ("bochs", "[CPU0 WR]: LIN 0x4000 PHY 0x5000 (len=4", "the line is not whole"),
    ("bochs", "[CPU0 WR]: LIN 0x4000", "the line is not whole"),
    ("gem5", "77000: system.physmem: Write of size 8 on addr", "the line is not whole"),
    ("drmemtrace", "6 1: 4242 write        8 byte(s) @ ", "the line is not whole"),
    ("drmemtrace", "6 1: 4242 <marker: physical address for following virtual: ", "the line is not whole"),
    ("perf-script", "w  4242 1132.196672: page-fau", "the line is none of perf-script"),
    ("hyperdbg", "[+] 0x1 hit, process id: 0x4, core: 0x0, context (address): ", "the line is not whole"),
    ("hyperdbg", "[+] 0x1 hit, process id: 0x4, co", "the line is none of hyperdbg"),
    ("execlog", "[CPU0 WR]: PHY 0x000000005000 (len=4, UC): 0x00001235", "it looks like bochs, and a body has one format"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "line", "rule"), REFUSED, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(REFUSED)]
)
def test_a_line_that_is_refused(format: str, line: str, rule: str) -> None:
    good = next(good for name, good, _ in LINES if name == format)
    with pytest.raises(TraceError) as caught:
        read(format, f"{good}\n{line}\n")
    assert caught.value.rule.startswith("line 2: ") and rule in caught.value.rule, caught.value.rule


def test_several_accesses_of_an_instruction() -> None:
    head = '0, 0x7c21, 0x1, "push {r4, r5}"'
    found, taken = read("execlog", f"{head}, store, 0x10, RAM, store, 0x18, RAM, load, 0x20, vga, r4 -> 0x1\n")
    assert [(one["gpa"], one["access"]) for one in found] == [(0x10, W), (0x18, W), (0x20, R)]
    assert taken.address == "guest-physical"
    found, taken = read("execlog", f"{head}, store, 0x10, store, 0x18, load, 0x20\n")
    assert [(one["gpa"], one["access"]) for one in found] == [(0x10, W), (0x18, W), (0x20, R)]
    assert taken.address == "process-virtual"


def test_a_log_of_both_emulations_is_refused() -> None:
    with pytest.raises(TraceError, match="line 2: an access with a device and one without"):
        read("execlog", '0, 0x1, "a", store, 0x10, RAM\n0, 0x1, "a", store, 0x10\n')


@pytest.mark.parametrize("between", [0, 1])
def test_the_halves_of_a_read_modify_write(between: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are in different blocks of the text."""
    if between:
        monkeypatch.setattr("engine.trace.readers.lines.BLOCK_BYTES", 75)
    physical = "PHY 0x000000005000 (len=4, UC): 0x0000123"
    body = f"[CPU0 RW]: LIN 0x0000000000007000 {physical}4\n[CPU0 WR]: {physical}5\n[CPU0 WR]: {physical}6\n"
    found, _ = read("bochs", body)
    assert [(one["access"], one["gva"], one["linear"]) for one in found] == [(R, 0x7000, 1), (W, 0x7000, 1), (W, 0, 0)]


def test_physical_addresses_by_markers() -> None:
    markers = (
        "1 0: 42 <marker: version 6>\n"
        "2 0: 42 <marker: physical address for following virtual: 0x299000>\n"
        "3 0: 42 <marker: virtual address for prior physical: 0x4a9000>\n"
        "4 1: 42 write 8 byte(s) @ 0x00000000004a9010 by PC 0x401624\n"
        "5 1: 42 write 8 byte(s) @ 0x00000000004aa010 by PC 0x401624\n"
        "6 0: 42 <marker: physical address for following virtual: 0x777123>\n"
        "7 0: 42 <marker: virtual address for prior physical: 0x4a9123>\n"
        "8 1: 42 read 8 byte(s) @ 0x00000000004a9ff8 by PC 0x401624\n"
        "9 0: 42 <marker: physical address not available for 0x4a9000>\n"
        "10 1: 42 read 8 byte(s) @ 0x00000000004a9ff8 by PC 0x401624\n"
    )
    found, taken = read("drmemtrace", markers)
    assert [(one["gpa"], one["gva"]) for one in found] == [(0x299010, 0x4A9010), (0x777FF8, 0x4A9FF8)]
    assert taken.address == "guest-physical"
    assert taken.skipped["access to a page without a marker of its physical address"] == 2
    with pytest.raises(TraceError, match="line 2: the first marker of a physical address comes after accesses"):
        read("drmemtrace", "4 1: 42 write 8 byte(s) @ 0x4a9010 by PC 0x401624\n" + markers.split("\n", 1)[1])


def test_marker_time_is_in_microseconds() -> None:
    body = "1 0: 42 <marker: timestamp 13300000000000123>\n4 1: 42 write 8 byte(s) @ 0x10 by PC 0x40\n"
    assert read("drmemtrace", body)[0][0]["time"] == 13300000000000123 * 1000 % (1 << 64)


def test_gem5_of_both_flags_has_what_reached_memory() -> None:
    instruction = "77000: system.cpu: A0 T0 : 0x401624 @main : mov [rcx], rax : MemWrite :  D=0x4d A=0x4a9000\n"
    memory = "77000: system.physmem: Write of size 8 on address 0x299000 data 0x4d C\n"
    found, taken = read("gem5", instruction + memory)
    assert [one["gpa"] for one in found] == [0x299000] and taken.address == "guest-physical"
    assert taken.skipped == {"instruction: the lines of MemoryAccess are the records": 1}
    found, taken = read("gem5", instruction)
    assert [one["gpa"] for one in found] == [0x4A9000] and taken.address == "guest-virtual"
    assert (taken.sizes, np.uint64(found[0]["size"])) == ("assumed: 8 bytes", 8)


DUMP = """\
# PID, TID, IP, ADDR, LOCAL WEIGHT, DSRC, SYMBOL
554,554,0xffffffff81775b9a,0x560bd72151e0,0,0x1e05080021,[kernel.kallsyms]:elf_load
554,555,0x7fceddc48b70,0x7fceddc48b78,30,0x68100842,/usr/lib/ld.so:_start
554,555,0x7fceddc48b70,0x7fceddc48b80,30,0x68100844,/usr/lib/ld.so:_start
554,555,0x7fceddc48b70,0x7fceddc48b88,30,0x68100848,/usr/lib/ld.so:_start
"""


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_a_dump_of_perf_mem(separator: str) -> None:
    heading, *rows = DUMP.splitlines(keepends=True)
    found, taken = read("auto", heading + "".join(row.replace(",", separator) for row in rows))
    assert [(one["gpa"], one["access"], one["pc"]) for one in found] == [
        (0x560BD72151E0, W, 0xFFFFFFFF81775B9A),
        (0x7FCEDDC48B78, R, 0x7FCEDDC48B70),
        (0x7FCEDDC48B80, W, 0x7FCEDDC48B70),
    ]
    assert taken.address == "process-virtual" and taken.skipped == {"heading": 1, "prefetch": 1}


def test_a_dump_with_physical_addresses() -> None:
    body = (
        "# PID, TID, IP, ADDR, PHYS ADDR, LOCAL WEIGHT, DSRC, SYMBOL\n"
        "1,1,0x10,0x7f00,0x0000000000005f00,0,0x2,w:main\n"
        "1,1,0x10,0x8f00,0x0000000000000000,0,0x2,w:main\n"
    )
    found, taken = read("auto", body)
    assert [(one["gpa"], one["gva"], one["access"]) for one in found] == [(0x5F00, 0x7F00, R)]
    assert taken.address == "guest-physical" and taken.skipped["sample without a physical address"] == 1


REPORT = """\
# To display the perf.data header info, please use --header/--header-only options.
#
# Samples: 4  of event 'cpu/mem-loads,ldlat=30/P'
# Total weight : 100
# Sort order   : local_weight,mem,sym,dso,symbol_daddr,dso_daddr,snoop,tlb,locked
#
# Overhead,     Samples,Local Weight,Memory access           ,Symbol           ,Data Symbol              ,Locked
50.00%  , 3          ,30          ,L1 hit                  ,[.] main         ,[.] 0x00007fceddc5710f   ,N/A
50.00%  , 1          ,30          ,L1 hit                  ,[.] main         ,[.] table+0x8            ,N/A

# Samples: 2  of event 'cpu/mem-stores/P'
# Overhead,     Samples,Local Weight,Memory access           ,Symbol           ,Data Symbol              ,Locked
99.00%  , 2          ,0           ,L1 hit                  ,[k] main         ,[k] 0xffff888000001000   ,No
"""


def test_a_report_of_perf_mem_stands_for_its_samples() -> None:
    found, taken = read("auto", REPORT)
    assert [(one["gpa"], one["access"]) for one in found] == [
        *[(0x7FCEDDC5710F, R)] * 3,
        *[(0xFFFF888000001000, W)] * 2,
    ]
    assert taken.skipped["samples of a symbol, without their addresses: `perf mem -D -x, report` has them"] == 1
    assert taken.format == "perf-mem"


def test_a_report_with_physical_addresses_and_other_separators() -> None:
    body = (
        "# Samples: 9  of event 'ibs_op//'\n"
        "# Overhead;     Samples;Memory access           ;Data Symbol              ;Data Physical Address\n"
        " 1.96%  ; 2          ;N/A or N/A              ;[.] 0x00007fceddc5710f  ;[.] 0x12345678\n"
    )
    found, taken = read("auto", body)
    assert [(one["gpa"], one["gva"], one["access"]) for one in found] == [(0x12345678, 0x7FCEDDC5710F, W)] * 2
    assert taken.address == "guest-physical"


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("1,1,0x10,0x7f00,0,0x2,w:main\n", "there is no heading of perf mem"),
        ("# Overhead,     Samples,Symbol\n", "has no column Data Symbol here"),
        (REPORT.replace("# Overhead,     Samples,Local", "# Overhead,Samples,Local", 1), "one heading throughout"),
        (REPORT.replace("Data Symbol              ,Locked\n99", "Data Symbol\n99"), "one heading throughout"),
        (REPORT.replace(", 3  ", ", 0  "), "a line stands for 1 to 1048576 accesses"),
        (REPORT.replace(", 3  ", ", 1048577  "), "a line stands for 1 to 1048576 accesses"),
        (DUMP + "554,555,0x7fce", "the line is none of perf-mem, which has 'PID, TID, IP, ADDR, LOCAL WEIGHT, DSRC"),
    ],
)
def test_what_is_refused_of_perf_mem(body: str, rule: str) -> None:
    with pytest.raises(TraceError) as caught:
        read("perf-mem", body)
    assert rule in caught.value.rule


def test_lines_that_stand_for_many_are_given_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trace.readers.lines.ROWS", 2)
    assert len(read("perf-mem", REPORT)[0]) == 5
    monkeypatch.setattr("engine.trace.readers.lines.MOST_REPEATED", 4)
    with pytest.raises(TraceError, match="lines stand for more than 4 accesses together"):
        read("perf-mem", REPORT)


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("ffffffff81000000 T _text\nffffffff81000110 t startup_64\n", "the body is a list of symbols"),
        ("c1000000 T _text\r\nc1000110 t startup_32 [e1000-x]\r\n", "`subpage policy from-symbols FILE --object NAME`"),
        ("\x7fELF\x02\x01", "is an ELF file"),
        ("PERFILE2\x68", "`perf script -F comm,tid,time,event,addr,ip` makes text of it"),
    ],
)
def test_what_is_no_trace(body: str, rule: str) -> None:
    with pytest.raises(TraceError) as caught:
        read("auto", body)
    assert rule in caught.value.rule


def test_the_output_of_gem5_is_no_packet_trace() -> None:
    memory = "77000: system.physmem: Write of size 8 on address 0x299000 data 0x4d C"
    found, taken = read("auto", f"gem5 Simulator System.  https://www.gem5.org\n\ngem5 version 23.0\n{memory}\n")
    assert taken.format == "gem5" and [one["gpa"] for one in found] == [0x299000]
    with pytest.raises(TraceError, match="is gem5's packet trace"):
        read("auto", "gem5\x0b\n\x05name")


def test_a_foreign_line_says_how_it_is_passed_over() -> None:
    with pytest.raises(TraceError, match=r"line 2: .*; skip_unknown \(--skip-unknown\) passes over such lines"):
        read("lackey", "I  00401628,4\nhello\n")
