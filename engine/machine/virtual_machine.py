"""VirtualMachine: owns the state and offers the operations. The rules are in the packages below it.

Reads run on the last published state, from any thread, without waiting. A machine has one writer at a time; an
operation either publishes its whole effect or leaves the machine as it was.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.cpu import explain, frames
from engine.errors import Busy, Conflict, InvalidValue, LimitExceeded, NotEnabled, NotFound
from engine.kvm import enabling, memory, protections, spp, tracking
from engine.kvm import registers as reg
from engine.kvm.protection_head import protection_from_head, protection_to_head
from engine.kvm.protections import ProtectedObject, ProtectedPages, Protection
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec, check_pages
from engine.machine import creation, walks
from engine.machine.dirty import DirtyOperations
from engine.machine.fault_injection import Allocations
from engine.machine.host_memory import HostMemoryOperations
from engine.machine.hyperv import HypervOperations
from engine.machine.hyperv_vps import Runs, enter, hyperv_host, leave
from engine.machine.memory_slots import SlotOperations
from engine.machine.nested import NestedOperations, nested_in_use
from engine.machine.nested_states import NestedStates, states_from_head, states_to_head
from engine.machine.page_access import AccessOperations
from engine.machine.summary import Outline, outline_to_head
from engine.machine.tables import TableOperations
from engine.machine.trace_operations import TraceOperations
from engine.machine.vcpus import VcpuOperations, fast_path_serves
from engine.state.config import VmConfig
from engine.state.frame_store import Draft, FrameStore, Snapshot, blocks_of
from engine.state.head import config_from_head, config_to_head
from engine.state.retry import new_trail, run_all
from engine.trace.choices import ASK
from engine.trace.execution import Execute, execute
from engine.trace.interactive import InteractiveReplay
from engine.trace.objects import Targets, targets_of
from engine.trace.session import Replay, ReplayOptions, ReplayTransaction
from engine.trace.single import AccessRequest, AccessResult
from engine.trace.timed import TimedReplay

# What a machine takes of the host's memory is counted in these.
FRAME_BYTES = frames.FRAME_SIZE
MAX_WINDOW = 1 << 20
SET_BATCH = 1 << 16
HEAD_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SubpageRange:
    """Maps for ``npages`` pages from ``gfn``: one value for all, or uint32[npages]. Bit s = sub-page s writable.

    ``where`` goes before the names of fields in errors.
    """

    gfn: int
    npages: int
    access: NDArray[np.uint32] | int
    where: str = ""


@dataclass(frozen=True)
class State:
    """Everything that is published together."""

    snapshot: Snapshot
    slots: SlotMap
    protections: Mapping[str, Protection]
    targets: Targets
    nested: NestedStates = field(default_factory=NestedStates)


class VirtualMachine:
    """A guest under KVM. Make one with ``create`` or ``restore``."""

    def __init__(self, config: VmConfig, store: FrameStore, state: State) -> None:
        self.config = config
        self._store = store
        self._state = state
        self._writer = threading.Lock()
        self._saved: Snapshot | None = None

    @classmethod
    def create(cls, config: VmConfig, slots: Sequence[SlotSpec] = (), *, spp: bool = False) -> VirtualMachine:
        """A new machine; ``spp`` also enables sub-page protection."""
        config.validate()
        hyperv_host(config)
        store = creation.new_store(config)
        vm = cls(config, store, State(store.published, SlotMap(), {}, targets_of(())))
        with vm._change() as draft:
            creation.build(draft, config)
        for spec in slots:
            vm.set_slot(spec)
        if spp:
            vm.enable_spp()
        return vm

    # Reads. Each keeps the snapshot it looks at in a local name: rows of a snapshot that nobody keeps are used again.

    @property
    def spp_active(self) -> bool:
        return bool(self._register(int(reg.SPP_ACTIVE)))

    @property
    def tables(self) -> TableOperations:
        """Raw table entries, read and written."""
        return TableOperations(self.config, lambda: self._state.snapshot, self._change)

    @property
    def memory_slots(self) -> SlotOperations:
        """Memory slots: made, moved, changed, deleted."""
        return SlotOperations(self.config, lambda: self._state, self._change)

    @property
    def dirty(self) -> DirtyOperations:
        """What was written: looked at, harvested, read as KVM's log."""
        return DirtyOperations(self.config, lambda: self._state.slots, lambda: self._state.snapshot, self._change)

    @property
    def page_access(self) -> AccessOperations:
        """Read, write and execute of whole pages, paired with the write bitmap."""
        return AccessOperations(self.config, lambda: self.spp_active, lambda: self._state.snapshot, self._change)

    @property
    def allocations(self) -> Allocations:
        """What the host allocates for the machine, and which allocation fails."""
        return Allocations(lambda: self._state.snapshot, self._change)

    @property
    def host_memory(self) -> HostMemoryOperations:
        """What the host does to the memory behind the guest."""
        return HostMemoryOperations(self.config, self._change)

    def slots(self) -> tuple[SlotSpec, ...]:
        """Memory slots in order of their number, those of address space 1 last."""
        return self.memory_slots.all()

    def outline(self) -> Outline:
        """What the machine is: enough to list it."""
        identities = tuple(self.nested.identities())
        return Outline(self.config, self.slots(), identities, self.spp_active, self.allocations.failing)

    def protections(self) -> tuple[Protection, ...]:
        """Protections in order of creation."""
        return tuple(self._state.protections.values())

    def protection(self, name: str) -> Protection:
        """One protection. Raises NotFound."""
        if name not in self._state.protections:
            raise NotFound("must be the name of a protection of this machine", field="name", value=name)
        return self._state.protections[name]

    def subpages(self, gfn: int, npages: int, layer: str = "effective") -> NDArray[np.uint32]:
        """Maps of consecutive pages, uint32[npages] (KVM_SUBPAGES_GET_ACCESS); ``layer`` is one of LAYER_NAMES."""
        if layer not in spp.LAYER_NAMES:
            raise InvalidValue(f"layer is one of {', '.join(spp.LAYER_NAMES)}", field="layer", value=layer)
        snapshot = self._state.snapshot
        machine = snapshot.machine
        self._check_active()
        self._check_window(machine, gfn, npages)
        maps = np.empty(npages, dtype=np.uint32)
        spp.read_maps(machine, gfn, spp.LAYER_NAMES.index(layer), maps)
        return maps

    def read_memory(self, gpa: int, size: int) -> bytes:
        """Guest RAM contents, zero where nothing was written."""
        snapshot = self._state.snapshot
        machine = snapshot.machine
        self._check_bytes(machine, gpa, size, "size")
        return memory.read_bytes(machine, gpa, size)

    def walk(
        self,
        gpa: int,
        access: int | None = None,
        size: int = 8,
        vcpu: int = 0,
        kind: int = acc.DATA,
        linear: int = acc.LINEAR_VALID,
        circumstances: int = 0,
    ) -> walks.Walk:
        """What the processor finds of an access, entry by entry, and how it ends once KVM has done its part.

        Changes nothing: the access is executed on a twin of the machine, which costs a copy of its frames.
        ``kind``, ``linear`` and ``circumstances`` are as ``arch.access`` has them; ``access`` is what the kind does
        unless given.
        """
        access = acc.default_access(kind) if access is None else access
        request = AccessRequest(gpa, size, access, vcpu, kind=kind, linear=linear, circumstances=circumstances)
        request.validate(self.config)
        twin = self._twin()
        position = self.config.vcpu_position(vcpu)
        now = explain.explain(twin._state.snapshot.machine, position, gpa, size, request.how)
        try:
            result = twin.access(request)
        except LimitExceeded as limit:
            return walks.cut_short(now, limit)
        machine = twin._state.snapshot.machine
        after = explain.explain(machine, position, gpa, size, request.how)
        return walks.walk_of(machine, now, result, after)

    @property
    def frames_in_use(self) -> int:
        """4 KiB frames in use: tables, guest memory, bitmaps and what else is kept in frames. In constant time."""
        machine = self._state.snapshot.machine
        return len(machine.row_of) - int(machine.top[frames.TOP_FREE])

    def counters(self) -> dict[str, int]:
        """Totals since creation, by the names in ``kvm.registers``, and frames and bytes in use."""
        snapshot = self._state.snapshot
        machine = snapshot.machine
        words = machine.rows[machine.row_of[frames.STATE_FRAME]]
        counts = {name: int(words[reg.COUNTERS_AT + i]) for i, name in enumerate(reg.COUNTERS)}
        kinds = np.bincount(machine.kind, minlength=len(frames.KIND_NAMES))
        counts.update({f"frames_{name}": int(kinds[i]) for i, name in enumerate(frames.KIND_NAMES) if i})
        counts["memory_bytes"] = int(kinds[1:].sum()) * frames.FRAME_SIZE
        return counts

    @property
    def vcpus(self) -> VcpuOperations:
        """What can be done to one vCPU: its VMCS, VM entry, INVEPT and INVVPID, its translation cache."""
        return VcpuOperations(self.config, self.config.vcpu_position, lambda: self._state.snapshot, self._change)

    @property
    def nested(self) -> NestedOperations:
        """Nested VMX and SVM state of the vCPUs, their CPUID and MSRs, the enlightened VMCS."""
        return NestedOperations(self.config, lambda: (self._state.snapshot, self._state.nested), self._change)

    @property
    def hyperv(self) -> HypervOperations:
        """Hypercalls, flush queues, TLB locks, assist pages, partitions."""
        return HypervOperations(self.config, lambda: (self._state.snapshot, self._state.nested), self._change)

    # Changes

    def set_slot(self, spec: SlotSpec) -> None:
        """KVM_SET_USER_MEMORY_REGION: a new slot, or a known one moved or changed."""
        self.memory_slots.set(spec)

    def delete_slot(self, slot: int) -> None:
        """Delete a memory slot with its SET maps and contents. Raises NotFound."""
        self.memory_slots.delete(slot)

    def create_vcpu(self, vcpu: int) -> None:
        """KVM_CREATE_VCPU. Raises InvalidValue for an id that cannot be, that is taken (EEXIST), or without room."""
        grown = creation.with_vcpu(self.config, vcpu)
        with self._change() as draft:
            creation.admit_vcpus(draft, grown)
        self.config = grown

    def enable_spp(self) -> None:
        """KVM_INIT_SPP: switch sub-page protection on; a second time does nothing."""
        enabling.check(self.config, nested_in_use(self._state.nested))
        if not self.spp_active:
            self.allocations.take(len(self._state.slots))
            with self._change() as draft:
                draft.ensure(self.config.vcpu_records)
                spp.enable(draft.machine)
                creation.load_sppt(draft, self.config)

    def set_subpages(self, ranges: Sequence[SubpageRange]) -> None:
        """KVM_SUBPAGES_SET_ACCESS over any number of ranges, in order, all or nothing."""
        state = self._state
        self._check_active()
        for item in ranges:
            self._check_range(state.snapshot.machine, item)
        with self._change(since=state) as draft:
            for item in ranges:
                _set_range(draft, item)

    def protect(
        self,
        name: str,
        objects: Sequence[ProtectedObject],
        ranges: Sequence[ProtectedPages] = (),
        about: str | None = None,
    ) -> Protection:
        """Protect named objects, and pages without a name. Raises Conflict when the name is taken."""
        protection = Protection(name, tuple(objects), tuple(ranges), about)
        protections.validate(protection, self.config.maxphyaddr)
        state = self._state
        whole = next((at for at, item in enumerate(protection.objects) if item.granularity == "page"), None)
        if whole is not None and not self.spp_active:
            raise NotEnabled(
                "whole pages are protected by all their sub-pages: they need sub-page protection (PUT …/spp), too, as "
                "long as machines without it cannot protect pages",
                field=f"objects[{whole}].granularity",
                value="page",
            )
        self._check_active()
        if name in state.protections:
            raise Conflict(
                "must be a new name: a protection of that name exists", field="name", value=name, errno="EEXIST"
            )
        for position, item in enumerate(protection.objects):
            self._check_slots(state.snapshot.machine, item.first_gfn, item.pages, f"objects[{position}].gpa", item.gpa)
        for position, pages in enumerate(protection.ranges):
            self._check_slots(state.snapshot.machine, pages.gfn, pages.npages, f"pages[{position}][0]", pages.gfn)
        self._recover(state, protection, {**state.protections, name: protection})
        return protection

    def unprotect(self, name: str) -> None:
        """Delete a protection; what other protections cover stays covered. Raises NotFound."""
        state = self._state
        gone = self.protection(name)
        self._recover(state, gone, {k: v for k, v in state.protections.items() if k != name})

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store bytes in guest RAM from the host's side: no permission applies."""
        state = self._state
        self._check_bytes(state.snapshot.machine, gpa, len(data), "body")
        with self._change(since=state) as draft:
            _write_from_host(draft, gpa, data)

    def access(self, request: AccessRequest, run: Execute = execute) -> AccessResult:
        """One guest access, executed by ``run``: on its own, or as one that asks (see ``trace.interactive_access``)."""
        request.validate(self.config)
        with self._change() as draft:
            enter(draft, self.config, request.vcpu)
            result, places, tally = run(draft, request, self.config, self._state.targets)
            data = request.data or b""
            for gpa, size in places if data else ():
                _write(draft, gpa, data[:size])
                data = data[size:]
            _count(draft, tally)
            leave(draft, self.config, request.vcpu)
            if result.allowed and places and request.access == acc.READ:
                return result.with_data(b"".join(memory.read_bytes(draft.machine, *place) for place in places))
        return result

    def replay(self, options: ReplayOptions, earlier: InteractiveReplay | None = None) -> ReplayTransaction:
        """A replay, one transaction: ``with vm.replay(options) as r: r.feed(chunk) …; r.finish()``.

        With ``on_violation`` ask it may pause; given as ``earlier``, it goes on in the next transaction.
        """
        options.validate()
        self._acquire()
        try:
            draft = self._begin()
            runs = Runs(draft, self.config)
            replay: Replay
            if earlier is not None:
                earlier.go_on(draft, self._state.targets, runs)
                replay = earlier
            elif options.on_violation == ASK:
                replay = InteractiveReplay(draft, options, self._state.targets, runs)
            else:
                operations = TraceOperations(draft, self.config)
                replay = TimedReplay(draft, options, self._state.targets, runs, operations)
        except BaseException:
            self._writer.release()
            raise

        def publish(done: Replay) -> None:
            try:
                _count(draft, done.uncounted())
                runs.finish()
                self._publish(draft, self._state.slots, self._state.protections)
            except BaseException:
                self._store.abandon(draft)
                raise
            finally:
                self._writer.release()

        def abandon() -> None:
            self._store.abandon(draft)
            self._writer.release()

        return ReplayTransaction(replay, publish, abandon)

    # The durable form

    def head(self) -> dict[str, Any]:
        """The small part of the durable form, as JSON: configuration, slots, protections, number of frames."""
        return {**self._head_of_others(), "slots": json.loads(self._state.slots.json)}

    def head_json(self) -> str:
        """The head as text. A machine may have thousands of slots: the text of each is kept, not made again."""
        return f'{{"slots": {self._state.slots.json}, {json.dumps(self._head_of_others())[1:]}'

    def _head_of_others(self) -> dict[str, Any]:
        """The head without the slots."""
        state = self._state
        spp, failing = self.spp_active, self.allocations.failing
        return {
            "format": HEAD_FORMAT,
            "config": config_to_head(self.config),
            "protections": [protection_to_head(p) for p in state.protections.values()],
            "nested": states_to_head(self.config, state.nested),
            "frames": len(state.snapshot.machine.row_of),
            "outline": outline_to_head(spp_active=spp, failing=failing),
        }

    def changed_blocks(self) -> Iterator[tuple[str, int, bytes]]:
        """(array, block, 4096 bytes) for what changed since the last call that was read to its end, or everything.

        The array is the frame's kind and the block its number: a block's number alone tells which one it replaces,
        and a freed frame comes as array ``free``.
        """
        snapshot = self._state.snapshot
        since = self._saved.machine if self._saved is not None else None
        for frame, kind, data in blocks_of(snapshot.machine, since):
            yield frames.KIND_NAMES[kind], frame, data
        self._saved = snapshot

    def blocks_since(self, earlier: VirtualMachine | None) -> Iterator[tuple[str, int, bytes]]:
        """As ``changed_blocks``, against what an earlier machine shows (see ``successor``); remembers nothing."""
        since = earlier._state.snapshot.machine if earlier is not None else None
        for frame, kind, data in blocks_of(self._state.snapshot.machine, since):
            yield frames.KIND_NAMES[kind], frame, data

    def bound_frames(self, most: int) -> None:
        """Refuse, from now on, to grow when more than ``most`` frames are in use: LimitExceeded, nothing is changed.

        Growth is by halves, so that one change may end beyond it; whoever must not have that looks at
        ``frames_in_use`` before keeping the change.
        """
        self._store.limit = most

    def successor(self) -> VirtualMachine:
        """A machine that goes on from this state and takes the changes; this one shows its state for good.

        Until the successor is withdrawn this machine refuses changes, so there is one line of states. Raises Busy
        while a change is under way.
        """
        self._acquire()
        after = copy.copy(self)
        after._writer = threading.Lock()
        return after

    def withdraw(self, after: VirtualMachine) -> None:
        """Undo all that was done to the successor, which takes no changes any more; this machine takes them again."""
        after._acquire()
        self._store.revert(self._state.snapshot)
        self._writer.release()

    @classmethod
    def restore(cls, head: Mapping[str, Any], blocks: Mapping[tuple[str, int], bytes]) -> VirtualMachine:
        """The machine that ``head`` and all its blocks describe; ``blocks`` maps (array, block) to 4096 bytes."""
        if head["format"] != HEAD_FORMAT:
            raise InvalidValue(f"this release reads format {HEAD_FORMAT}", field="format", value=head["format"])
        config = config_from_head(head["config"])
        store = creation.new_store(config)
        kinds = {name: kind for kind, name in enumerate(frames.KIND_NAMES)}
        store.adopt(
            {block: (kinds[array], data) for (array, block), data in blocks.items() if array != "free"}, head["frames"]
        )
        slots = SlotMap.of(SlotSpec(*row) for row in head["slots"])
        known = {item.name: item for item in map(protection_from_head, head["protections"])}
        nested = states_from_head(config, head.get("nested", {}))
        vm = cls(config, store, State(store.published, slots, known, _targets(known), nested))
        with vm._change():
            pass
        return vm

    # Inside

    def _twin(self) -> VirtualMachine:
        """A machine in the same state, to be changed and thrown away; this one takes no notice of it."""
        state = self._state
        store = self._store.twin(state.snapshot)
        return VirtualMachine(self.config, store, replace(state, snapshot=store.published))

    def _register(self, position: int) -> int:
        snapshot = self._state.snapshot
        machine = snapshot.machine
        return int(machine.rows[machine.row_of[frames.STATE_FRAME], position])

    def _check_active(self) -> None:
        if not self.spp_active:
            raise enabling.not_enabled()

    def _check_window(self, machine: frames.Machine, gfn: int, npages: int) -> None:
        if not 1 <= npages <= MAX_WINDOW:
            raise InvalidValue(f"npages is 1 to {MAX_WINDOW}", field="npages", value=npages)
        self._check_slots(machine, gfn, npages, "gfn")

    def _check_slots(
        self, machine: frames.Machine, gfn: int, npages: int, field: str, value: int | None = None
    ) -> None:
        check_pages(machine, self.config.maxphyaddr, gfn, npages, field, value)

    def _check_range(self, machine: frames.Machine, item: SubpageRange) -> None:
        if item.npages < 1:
            raise InvalidValue("npages is at least 1", field=f"{item.where}npages", value=item.npages)
        self._check_slots(machine, item.gfn, item.npages, f"{item.where}gfn")
        if isinstance(item.access, int):
            if not 0 <= item.access < 1 << 32:
                raise InvalidValue("a map has 32 bits", field=f"{item.where}access", value=item.access)
        elif len(item.access) != item.npages:
            raise InvalidValue("there is one map for each page", field=f"{item.where}access", value=len(item.access))

    def _check_bytes(self, machine: frames.Machine, gpa: int, size: int, field: str) -> None:
        if size < 1:
            raise InvalidValue("at least one byte is asked for", field=field, value=size)
        if gpa < 0:
            raise InvalidValue("an address is not negative", field="gpa", value=gpa)
        self._check_slots(machine, gpa >> 12, ((gpa + size - 1) >> 12) - (gpa >> 12) + 1, "gpa", gpa)

    def _acquire(self) -> None:
        if not self._writer.acquire(blocking=False):
            raise Busy("another change of this machine is under way")

    def _begin(self, slots: SlotMap | None = None) -> Draft:
        draft = self._store.begin((self._state.slots if slots is None else slots).table)
        draft.beside = self._state.nested
        serves = fast_path_serves(self.config, draft.machine)
        if bool(draft.machine.caps[frames.CAP_FAST_PATH]) != serves:
            caps = draft.machine.caps.copy()
            caps[frames.CAP_FAST_PATH] = serves
            draft.machine = draft.machine._replace(caps=caps)
        return draft

    @contextmanager
    def _change(
        self,
        since: State | None = None,
        slots: SlotMap | None = None,
        protections: Mapping[str, Protection] | None = None,
    ) -> Iterator[Draft]:
        """A change, published when the block ends well. ``since`` is the state that its input was checked against."""
        self._acquire()
        try:
            if since is not None and since is not self._state:
                raise Busy("another change of this machine came first")
            draft = self._begin(slots)
            try:
                yield draft
            except BaseException:
                self._store.abandon(draft)
                raise
            self._publish(
                draft,
                self._state.slots if slots is None else slots,
                self._state.protections if protections is None else protections,
            )
        finally:
            self._writer.release()

    def _publish(self, draft: Draft, slots: SlotMap, protections: Mapping[str, Protection]) -> None:
        same = protections is self._state.protections
        targets = self._state.targets if same else _targets(protections)
        self._store.publish(draft)
        self._state = State(self._store.published, slots, protections, targets, draft.beside)

    def _recover(self, since: State, changed: Protection, left: Mapping[str, Protection]) -> None:
        """Store what ``left`` covers on the pages of a protection that came or went."""
        gfns, _ = protections.page_masks(changed.objects, changed.ranges)
        objects = [item for p in left.values() for item in p.objects]
        masks = protections.masks_at(gfns, objects, [item for p in left.values() for item in p.ranges])
        trail = new_trail()
        with self._change(since=since, protections=left) as draft:
            run_all(draft, len(gfns), lambda start: spp.cover(draft.machine, gfns, masks, start, trail))


def _targets(protections: Mapping[str, Protection]) -> Targets:
    return targets_of([item for p in protections.values() for item in p.objects])


def _set_range(draft: Draft, item: SubpageRange) -> None:
    trail = new_trail()
    for begin in range(0, item.npages, SET_BATCH):
        count = min(SET_BATCH, item.npages - begin)
        if isinstance(item.access, int):
            maps = np.full(count, item.access, dtype=np.uint32)
        else:
            # A copy: an array over bytes that may not be written would be another signature, compiled at that moment.
            maps = np.array(item.access[begin : begin + count], dtype=np.uint32)
        first = item.gfn + begin
        run_all(draft, count, lambda start: spp.set_maps(draft.machine, first, maps, start, trail))  # noqa: B023


def _write(draft: Draft, gpa: int, data: bytes) -> None:
    array = np.frombuffer(data, dtype=np.uint8)
    run_all(draft, len(array), lambda done: done + memory.write_page(draft.machine, gpa + done, array[done:]))


def _write_from_host(draft: Draft, gpa: int, data: bytes) -> None:
    """Store bytes that no processor wrote: the dirty logs are told."""
    _write(draft, gpa, data)
    step = 1 << 16
    count = -(-len(data) // step)

    def note(done: int) -> int:
        begin = done * step
        tracking.note_host_write(draft.machine, gpa + begin, min(step, len(data) - begin))
        return done + 1

    run_all(draft, count, note)


def _count(draft: Draft, tally: NDArray[np.int64]) -> None:
    machine = draft.machine
    row = frames.own(machine, frames.STATE_FRAME)
    machine.rows[row, reg.COUNTERS_AT : reg.COUNTERS_AT + len(tally)] += tally
