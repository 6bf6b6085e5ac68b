"""VirtualMachine: owns the state and offers the operations, group by group. The rules are in the packages below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.cpu import frames
from engine.images.base import Block
from engine.kvm import state_frame as reg
from engine.kvm.protections import ProtectedPages, Protection
from engine.kvm.slot_files import OpenFile, SlotFile
from engine.kvm.slots import SlotSpec
from engine.machine import creation, durable, vcpu_ids, vcpu_records, walks
from engine.machine.dirty import DirtyOperations
from engine.machine.fault_injection import Allocations
from engine.machine.guest_walks import GuestWalk, walk_guest
from engine.machine.host_memory_operations import HostMemoryOperations
from engine.machine.hyperv import HypervOperations
from engine.machine.hyperv_vps import hyperv_host
from engine.machine.memory_operations import Loaded, Memory
from engine.machine.nested import NestedOperations
from engine.machine.page_access import AccessOperations
from engine.machine.protection_operations import Protections
from engine.machine.slot_operations import SlotOperations
from engine.machine.state import MachineState, State, register
from engine.machine.subpage_operations import SubpageRange, Subpages
from engine.machine.summary import Summary
from engine.machine.symbol_operations import SymbolOperations
from engine.machine.tables import TableOperations
from engine.machine.traces import Traces
from engine.machine.vcpu_operations import VcpuOperations
from engine.machine.virtual_objects import Given, Moved
from engine.state.config import VmConfig
from engine.state.frame_store import Snapshot
from engine.trace.access_execution import Execute, execute
from engine.trace.interactive import InteractiveReplay
from engine.trace.interactive_timed import Watched, nobody_watches
from engine.trace.session import ReplayOptions, ReplayTransaction
from engine.trace.single import AccessRequest, AccessResult

# What a machine takes of the host's memory is counted in these.
FRAME_BYTES = frames.FRAME_SIZE


class VirtualMachine:
    """A guest under KVM. Make one with ``create`` or ``restore``.

    Reads look at the last published state, from any thread, without waiting. A machine has one writer at a time; an
    operation either publishes its whole effect or leaves the machine as it was.
    """

    def __init__(self, state: MachineState) -> None:
        self.state = state
        self._saved: Snapshot | None = None
        self._subpages = Subpages(state)
        self._protections = Protections(state)
        self._memory = Memory(state)
        self._traces = Traces(state)
        # Memory slots: made, moved, changed, deleted.
        self.memory_slots = SlotOperations(state)
        # Read, write and execute of whole pages, paired with the write bitmap.
        self.page_access = AccessOperations(state)
        # What was written: looked at, harvested, read as KVM's log.
        self.dirty = DirtyOperations(state)
        # Raw table entries, read and written.
        self.tables = TableOperations(state)
        # What can be done to one vCPU: its VMCS, VM entry, INVEPT and INVVPID, its translation cache.
        self.vcpus = VcpuOperations(state)
        # Nested VMX and SVM state of the vCPUs, their CPUID and MSRs, the enlightened VMCS.
        self.nested = NestedOperations(state)
        # Hypercalls, flush queues, TLB locks, assist pages, partitions.
        self.hyperv = HypervOperations(state)
        # What the host does to the memory behind the guest.
        self.host_memory = HostMemoryOperations(state)
        # Names of the guest's memory.
        self.symbols = SymbolOperations(state)
        # What the host allocates for the machine, and which allocation fails.
        self.allocations = Allocations(state)

    @classmethod
    def create(cls, config: VmConfig, slots: Sequence[SlotSpec] = (), *, spp: bool = False) -> VirtualMachine:
        """A new machine; ``spp`` also enables sub-page protection."""
        config.validate()
        hyperv_host(config)
        store = creation.new_store(config)
        vm = cls(MachineState(store, State(config, store.published)))
        with vm.state.change() as change:
            creation.build(change, config)
        for spec in slots:
            vm.set_slot(spec)
        if spp:
            vm.enable_spp()
        return vm

    # What it is

    @property
    def config(self) -> VmConfig:
        return self.state.current.config

    @property
    def spp_active(self) -> bool:
        return self._subpages.active

    def summary(self) -> Summary:
        """What the machine is: enough to list it."""
        identities = tuple(self.nested.identities())
        return Summary(self.config, self.slots(), identities, self.spp_active, self.allocations.failing)

    @property
    def frames_in_use(self) -> int:
        """4 KiB frames in use: tables, guest memory, bitmaps and what else is kept in frames. In constant time."""
        return frames.in_use(self.state.current.snapshot.machine)

    def counters(self) -> dict[str, int]:
        """Totals since creation, by the names in ``kvm.state_frame``, and frames and bytes in use."""
        now = self.state.current
        machine = now.snapshot.machine
        words = machine.rows[machine.row_of[frames.STATE_FRAME]]
        counts = {name: int(words[reg.COUNTERS_AT + i]) for i, name in enumerate(reg.COUNTERS)}
        kinds = np.bincount(machine.kind, minlength=len(frames.KIND_NAMES))
        counts.update({f"frames_{name}": int(kinds[i]) for i, name in enumerate(frames.KIND_NAMES) if i})
        counts["memory_bytes"] = int(kinds[1:].sum()) * frames.FRAME_SIZE
        return counts

    # Memory slots and vCPUs

    def slots(self) -> tuple[SlotSpec, ...]:
        """Memory slots in order of their number, those of address space 1 last."""
        return self.memory_slots.all()

    def set_slot(self, spec: SlotSpec) -> None:
        """KVM_SET_USER_MEMORY_REGION: a new slot, or a known one moved or changed."""
        self.memory_slots.set(spec)

    def delete_slot(self, slot: int) -> None:
        """Delete a memory slot with its SET maps and contents. Raises NotFound."""
        self.memory_slots.delete(slot)

    def create_vcpu(self, vcpu: int) -> None:
        """KVM_CREATE_VCPU. Raises InvalidValue for an id that cannot be, that is taken (EEXIST), or without room.

        Its registers are those after RESET, it has no CPUID, and its VP index is its place among the vCPUs.
        """
        now = self.state.current
        grown = vcpu_ids.with_vcpu(now.config, vcpu)
        with self.state.change(since=now) as change:
            vcpu_records.admit(change, grown)
            change.config = grown

    # Guest memory

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest RAM contents, zero where nothing was written."""
        return self._memory.read(gpa, size)

    def read_in_page(self, gpa: int, size: int) -> bytes | None:
        """The same of bytes that lie in one page, soon found; None where that has no slot."""
        return self._memory.read_in_page(gpa, size)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest RAM from the host's side: no permission applies."""
        self._memory.write(gpa, data)

    def load_image(self, blocks: Iterable[Block], grown: Callable[[int], None] = lambda frames: None) -> Loaded:
        """Store the blocks of a memory image, all of them or nothing; see ``engine.images``."""
        return self._memory.load(blocks, grown)

    @property
    def image_frames(self) -> int:
        """Frames that memory images have brought."""
        return register(self.state.current.snapshot.machine, reg.IMAGE_FRAMES)

    # Sub-pages and protections

    def enable_spp(self) -> None:
        """KVM_INIT_SPP: switch sub-page protection on; a second time does nothing."""
        self._subpages.enable()

    def subpages(self, gfn: int, npages: int, layer: str = "effective") -> NDArray[np.uint32]:
        """Maps of consecutive pages, uint32[npages] (KVM_SUBPAGES_GET_ACCESS); ``layer`` is one of LAYER_NAMES."""
        return self._subpages.read(gfn, npages, layer)

    def set_subpages(self, ranges: Sequence[SubpageRange]) -> None:
        """KVM_SUBPAGES_SET_ACCESS over any number of ranges, in order, all or nothing."""
        self._subpages.set(ranges)

    def protections(self) -> tuple[Protection, ...]:
        """Protections in order of creation."""
        return self._protections.all()

    def protection(self, name: str) -> Protection:
        """One protection. Raises NotFound."""
        return self._protections.find(name)

    def protect(
        self,
        name: str,
        objects: Sequence[Given],
        ranges: Sequence[ProtectedPages] = (),
        about: str | None = None,
    ) -> Protection:
        """Protect named objects, and pages without a name. Raises Conflict when the name is taken."""
        return self._protections.add(name, objects, ranges, about)

    def retranslate(self, name: str) -> tuple[Protection, list[Moved]]:
        """Walk again what a protection has by linear address; the protection as it is now, and what moved."""
        return self._protections.retranslate(name)

    def unprotect(self, name: str) -> None:
        """Delete a protection; what other protections cover stays covered. Raises NotFound."""
        self._protections.remove(name)

    # What the guest does

    def access(self, request: AccessRequest, run: Execute = execute) -> AccessResult:
        """One guest access, executed by ``run``: on its own, or as one that asks (see ``trace.interactive_access``)."""
        return self._traces.access(request, run)

    def replay(
        self, options: ReplayOptions, earlier: InteractiveReplay | None = None, watched: Watched = nobody_watches
    ) -> ReplayTransaction:
        """A replay, one transaction: ``with vm.replay(options) as r: r.feed(chunk) …; r.finish()``.

        With ``on_violation`` ask it may pause, before loads of CR3 that are ``watched``, too; given as ``earlier``, it
        goes on in the next transaction.
        """
        return self._traces.replay(options, earlier, watched)

    def walk(
        self,
        gpa: int,
        access: int | None = None,
        size: int = 8,
        vcpu: int = 0,
        kind: int = acc.DATA,
        linear: int = acc.LINEAR_VALID,
        circumstances: int = 0,
        gva: int | None = None,
    ) -> walks.Walk:
        """What the processor finds of an access, entry by entry, and how it ends; changes nothing.

        ``kind``, ``linear`` and ``circumstances`` are as ``arch.access`` has them; ``access`` is what the kind does
        unless given; ``gva`` a note.
        """
        access = acc.default_access(kind) if access is None else access
        request = AccessRequest(gpa, size, access, vcpu, gva, kind=kind, linear=linear, circumstances=circumstances)
        return self._traces.walk(request, execute)

    def guest_walk(self, gva: int, size: int, vcpu: int, cr3: int | None = None) -> GuestWalk:
        """What the guest's own page tables say of a linear address; see ``guest_walks``."""
        return walk_guest(self.state.current.snapshot.machine, self.config, gva, size, vcpu, cr3)

    # The durable form

    @classmethod
    def restore(
        cls,
        head: Mapping[str, Any],
        blocks: Mapping[tuple[str, int], bytes],
        attach: Callable[[SlotFile], OpenFile | None] = lambda file: None,
    ) -> VirtualMachine:
        """The machine that ``head`` and all its blocks describe; ``blocks`` maps (array, block) to 4096 bytes, and
        ``attach`` opens the files behind its slots: without it their bytes cannot be read."""
        return cls(durable.restored(head, blocks, attach))

    def head(self) -> dict[str, Any]:
        """The small part of the durable form, as JSON: configuration, slots, protections, number of frames."""
        return durable.head_of(self.state.current)

    def head_json(self) -> str:
        """The head as text."""
        return durable.head_text(self.state.current)

    def changed_blocks(self) -> Iterator[tuple[str, int, bytes]]:
        """(array, block, 4096 bytes) for what changed since the last call that was read to its end, or everything."""
        snapshot = self.state.current.snapshot
        yield from durable.blocks_between(snapshot, self._saved)
        self._saved = snapshot

    def blocks_since(self, earlier: VirtualMachine | None) -> Iterator[tuple[str, int, bytes]]:
        """As ``changed_blocks``, against what an earlier machine shows (see ``successor``); remembers nothing."""
        shown = None if earlier is None else earlier.state.current.snapshot
        yield from durable.blocks_between(self.state.current.snapshot, shown)

    # Lines of states

    def bound_frames(self, most: int) -> None:
        """Refuse, from now on, changes that end with more than ``most`` frames in use, unless they were in use before:
        LimitExceeded, nothing is changed."""
        self.state.store.limit = most

    @property
    def growth_is_near(self) -> bool:
        """Whether another successor would have to copy many frames to get room: states that are kept take rows until
        nobody shows them."""
        return self.state.store.growth_is_near

    def successor(self) -> VirtualMachine:
        """A machine that goes on from this state and takes the changes; this one shows its state for good.

        Until the successor is withdrawn this machine refuses changes, so there is one line of states. Raises Busy
        while a change is under way.
        """
        after = VirtualMachine(self.state.successor())
        after._saved = self._saved
        return after

    def clone(self, name: str) -> VirtualMachine:
        """Another machine that begins as this one is, under another name; from then on neither sees what the other
        does. It copies no frame before its first change. From any thread, whatever is under way here."""
        return VirtualMachine(self.state.clone(replace(self.config, name=name)))

    @property
    def borrows_frames(self) -> bool:
        """Whether it is a clone that has not been changed: its frames are those of another machine."""
        return self.state.current.snapshot.loan is not None

    def own_frames(self) -> None:
        """Copy frames that are borrowed, which the first change would do otherwise. It takes time by their number."""
        self.state.own()

    def withdraw(self, after: VirtualMachine) -> None:
        """Undo all that was done to the successor, which takes no changes any more; this machine takes them again."""
        self.state.withdraw(after.state)
