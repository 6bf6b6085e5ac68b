"""What is driven once so that every kernel a service can reach has been called: steps that know nothing of each other.

A step makes a machine of its own, as small as one page table, and calls operations for the kernels behind them.
``FIRST`` is what the main job calls: create a machine, protect objects, replay a trace, read what came out.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from io import BytesIO

import numpy as np

from engine.arch.hypercall import GUEST_PHYSICAL_SPACE, LIST, SPACE
from engine.arch.hyperv_cpuid import INTERFACE_SIGNATURE, LEAF_INTERFACE, LEAF_RECOMMENDATIONS, CpuidEntry
from engine.cpu import frames
from engine.cpu.ept import TRAIL_ROWS
from engine.footprint.build import Builder
from engine.footprint.costs import costs
from engine.footprint.places import By, Origin
from engine.footprint.tables import FIRST_ROWS
from engine.hyperv import nested_paging
from engine.hyperv.encode import CallFields
from engine.hyperv.flush_execution import drop_nested
from engine.images import open_image
from engine.ioctls.partial_set import SubpageCalls
from engine.kvm import exit_handling, mapping, spp_set, sppt_roots
from engine.kvm.granted_subpages import grant_touched
from engine.kvm.memory_views import GuestMemory
from engine.kvm.protections import ProtectedObject, Protection, VirtualObject
from engine.kvm.slots import SlotSpec, first_page_without_slot
from engine.machine import SubpageRange, VirtualMachine
from engine.machine.hypercalls import HypercallRequest
from engine.machine.page_access import AccessChange
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.state.profiles import PROFILES
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay
from engine.trace.object_hits import attribute, fill_objects
from engine.trace.operations import INVLPG, MOV_CR3, Operation, Operations
from engine.trace.readers import open_trace
from engine.trace.replay import replay
from engine.trace.results import split_log
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest
from engine.vcpu.msr_numbers import HV_GUEST_OS_ID
from engine.vcpu.vcpu import SvmState, Vcpu

_HYPERV = (CpuidEntry(LEAF_INTERFACE, eax=INTERFACE_SIGNATURE), CpuidEntry(LEAF_RECOMMENDATIONS, eax=0x804))


def _machine() -> VirtualMachine:
    return VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 22)], spp=True)


def _protected() -> VirtualMachine:
    vm = _machine()
    vm.protect("warm", [ProtectedObject("object", 0x4010, 0x100)])
    return vm


def _replay() -> None:
    """The longest of all: begun first."""
    records = np.array([[0x4010, 8 | 1 << 16], [0x6000, 8 | 1 << 16]], dtype=np.uint64)
    with _machine().replay(ReplayOptions()) as run:
        run.feed(TraceChunk(records, None, {}))
        run.finish()


def _deep() -> None:
    """What a replay calls deep inside and is long to compile: the share of a second process."""
    trail, tally = np.zeros((TRAIL_ROWS, 4), dtype=np.int64), np.zeros(1, dtype=np.int64)
    with _machine().state.change() as draft:
        exit_handling.handle_exit(draft.machine, 0, 0, 0, 0, 0, 0, trail, tally)  # no reason: an internal error
        grant_touched(draft.machine, 0x4010, 8, trail)


def _protect() -> None:
    _protected()


def _violations() -> None:
    """A trace that meets a protection, and its exit records."""
    records = np.array([[0x4010, 8 | 1 << 16], [0x6000, 8 | 1 << 16]], dtype=np.uint64)
    vm = _protected()
    with vm.replay(ReplayOptions()) as run:
        run.feed(TraceChunk(records, None, {}))
        run.finish().exit_columns.objects()
    vm.counters()
    list(vm.changed_blocks())


def _subpages() -> None:
    vm = _protected()
    vm.set_subpages([SubpageRange(1, 2, 0xFFFF_0000), SubpageRange(3, 1, np.array([0], dtype=np.uint32))])
    vm.subpages(1, 4)
    vm.page_access.set([AccessChange(7, rights=5)])
    vm.page_access.read([7])
    vm.unprotect("warm")


def _whole_pages() -> None:
    """Pages that are tracked, until sub-page protection comes, and on a host without EPT by linear address."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 22)])
    vm.protect("warm", [ProtectedObject("object", 0x4010, 0x100, "page")])
    vm.access(AccessRequest(0x4010, on_violation="grant"))
    vm.enable_spp()
    shadowed = VirtualMachine.create(VmConfig(host=HostConfig(ept=False)), [SlotSpec(0, 0, 1 << 16)])
    for gpa in range(0, 0x3000, 0x1000):
        shadowed.write_memory(gpa, (gpa + 0x1003).to_bytes(8, "little"))
    shadowed.write_memory(0x3020, b"\3\x40")
    shadowed.protect("warm", [ProtectedObject("object", 0x4010, 0x100, "page")])
    shadowed.access(AccessRequest(None, gva=0x4010))


def _accesses() -> None:
    vm = _protected()
    vm.write_memory(0x5000, b"warm")
    vm.read_memory(0x5000, 4)
    vm.load_image(open_image("raw", BytesIO(b"warm".ljust(8192, b"\0")), 0x6000))
    vm.walk(0x4010)
    vm.access(AccessRequest(0x4010, on_violation="grant"))
    _ask(vm)


def _guest_addresses() -> None:
    vm = _protected()
    vm.access(AccessRequest(None, gva=0x4010))
    vm.protect("guest table", [ProtectedObject("entry", 0, 8)])
    vm.write_memory(0, b"\3")
    vm.access(AccessRequest(None, gva=0x4010, on_violation="allow"))
    vm.write_memory(0x20, b"\3")
    vm.protect("by table", [VirtualObject("object", 0x4010, 8)])
    with vm.replay(ReplayOptions(address="gva")) as run:
        run.feed(TraceChunk(np.array([[0x4010, 8 | 1 << 16], [0x8010, 8 | 1 << 16]], dtype=np.uint64), None, {}))
        run.finish()
    vm.vcpus.vm_entry(0)
    vm.vcpus.invept(0, 2, 0)
    vm.vcpus.invvpid(0, 2, 0, 0)


def _host() -> None:
    """Events of the host, dirty logs and slots that come and go, with pages that are mapped."""
    vm = _protected()
    vm.access(AccessRequest(0x4010, on_violation="grant"))
    vm.write_memory(0x5000, b"warm")
    vm.host_memory.event("age", 4)
    vm.host_memory.event("shrink")
    vm.unprotect("warm")
    vm.page_access.set([AccessChange(7, rights=5)])
    vm.dirty.track("page", "pml")
    vm.set_slot(SlotSpec(0, 0, 1 << 22, log_dirty=True))
    vm.dirty.track("subpage")
    vm.write_memory(0x5000, b"warm")
    vm.dirty.pages()
    vm.dirty.acknowledge(vm.dirty.harvest().harvest)
    vm.dirty.take_log(0)
    vm.set_slot(SlotSpec(0, 1 << 22, 1 << 22))
    vm.delete_slot(0)


def _ask(vm: VirtualMachine) -> None:
    """An interactive replay, answered in the ways that call kernels of their own."""
    records = np.array([[0x4080, 8 | 1 << 16], [0x4100, 8 | 1 << 16]], dtype=np.uint64)
    replaying: InteractiveReplay | None = None
    for action in (None, "allow", "grant"):
        with vm.replay(ReplayOptions(on_violation="ask"), replaying) as run:
            assert isinstance(run.replay, InteractiveReplay)
            replaying = run.replay
            going = run.feed(TraceChunk(records, None, {})) if action is None else replaying.answer(action)
            if not going:
                replaying.asked.objects()
            run.pause()


def _flushes() -> None:
    """The same for flushes of a translation cache, in both ways that select entries."""
    for policy in ("tlfs", "kvm"):
        config = VmConfig(translation_cache="model", flush_policy=policy, vcpus=(VcpuConfig(0, cpuid=_HYPERV),))
        vm = VirtualMachine.create(config, [SlotSpec(0, 0, 1 << 16)])
        vm.nested.write_msrs(0, [(HV_GUEST_OS_ID, 1 << 63)])
        for fields in (CallFields(SPACE, flags=2, processor_mask=1), CallFields(LIST, processor_mask=1, ranges=(0,))):
            vm.hyperv.hypercall(0, HypercallRequest(fields=fields, input_gpa=0))
        vm.hyperv.hypercall(0, HypercallRequest(fields=CallFields(GUEST_PHYSICAL_SPACE), input_gpa=0))
        with vm.state.change() as draft:
            drop_nested(draft.machine, 0)
        _trace(vm)


def _nested_paging() -> None:
    """The tables of a guest hypervisor: an entry that leads to itself is all that a walk needs."""
    vm = _machine()
    vm.write_memory(0, b"\7")
    with vm.state.change() as draft:
        for vcpu in (Vcpu(), Vcpu(svm=SvmState(guest_mode=True))):
            nested_paging.translate(vcpu, GuestMemory(draft), 0)


def _partial_sets() -> None:
    """A SET of the ioctls that meets a page without a slot, in both kernels."""
    for profile in PROFILES:
        vm = VirtualMachine.create(VmConfig(profile=profile), [SlotSpec(0, 0, 1 << 13)], spp=True)
        SubpageCalls(vm).set(1, np.zeros(2, dtype=np.uint32))
        SubpageCalls(vm).get(1, 2)


def _trace(vm: VirtualMachine) -> None:
    """A trace with operations between its accesses."""
    records = np.array([[0x1000 * (1 + n // 2), 8 | 1 << 16] for n in range(4)], dtype=np.uint64)
    gvas, spaces = np.full(4, 0x1000, dtype=np.uint64), np.zeros(4, dtype=np.uint64)
    items = (Operation(1, INVLPG, None, 0x1000, 0), Operation(3, MOV_CR3, None, None, 0))
    operations = Operations(np.array([1, 3]), items, spaces)
    with vm.replay(ReplayOptions()) as run:
        run.feed(TraceChunk(records, gvas, {}, operations=operations))
        run.finish()


def _lines() -> None:
    """Text of a tool."""
    for _ in open_trace("lackey", io.BytesIO(b"==1== Lackey\n S 00004010,8\n")):
        pass


def _footprints() -> None:
    """Places of a trace, even ones and others, more than there is room for at first, and apart by the instruction."""
    for kinds in (False, True):
        builder = Builder(by=By(pc=True)) if kinds else Builder("bytes")
        records = np.full((3 * FIRST_ROWS, 2), 8 | 1 << 16, dtype=np.uint64)
        records[:, 0] = np.arange(3 * FIRST_ROWS) << 3
        records[2 * FIRST_ROWS :, 1] = 3 | 1 << 16
        builder.feed(TraceChunk(records, None, {"pc": records[:, 0]}, kinds))
        found = builder.finish(Origin("", 0, "", ()))
        costs(found, [Protection("warm", (ProtectedObject("object", 0x4010, 0x100),))])


Step = Callable[[], None]

# In the order in which processes take them: the longest first.
FIRST: dict[str, Step] = {"replay": _replay, "deep": _deep, "protect": _protect, "violations": _violations}
REST: dict[str, Step] = {
    "flushes": _flushes,
    "nested paging": _nested_paging,
    "guest addresses": _guest_addresses,
    "host": _host,
    "subpages": _subpages,
    "whole pages": _whole_pages,
    "accesses": _accesses,
    "partial sets": _partial_sets,
    "lines": _lines,
    "footprints": _footprints,
}
ALL: dict[str, Step] = {**FIRST, **REST}

# What the steps of FIRST call from Python; what these call is compiled with them.
FIRST_KERNELS = (
    frames.new_frame,
    frames.address_of,
    frames.own,
    frames.read_word,
    frames.settle,
    frames.write_word,
    mapping.ept_pointer,
    first_page_without_slot,
    spp_set.cover,
    sppt_roots.enable,
    sppt_roots.root_frame,
    sppt_roots.tree_of,
    attribute,
    fill_objects,
    replay,
    split_log,
    exit_handling.handle_exit,
    grant_touched,
)


def warm() -> None:
    """Take every step here: what is not compiled yet is compiled, the rest is loaded."""
    for step in ALL.values():
        step()
