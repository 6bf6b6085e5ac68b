"""The engine's half of a conformance run: the machine of ``layout``, and one access per vector.

The machine is made of the engine's own frames, with the arena placed so that the frames of tables have the addresses
that the tables have under Bochs: raw entries need no translation. Words outside tables are guest memory (GPA = HPA).
``engine.cpu.control_checks`` checks the controls and ``engine.cpu.instruction`` makes the access.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch.words import signed, unsigned
from engine.cpu import control_checks, frames, instruction, tlb
from engine.cpu.fastpath import CACHE_WORDS, EMPTY
from engine.cpu.memory_slots import SLOT_WORDS
from engine.kvm import page_contents

from . import layout
from .bochs import Processor
from .vectors import READ_MODIFY_WRITES, Event, Kind, Outcome, Vector

# Frames 0 and 1 are the machine's registers and the vCPU record; the tables of ``layout`` follow, then free frames for
# guest memory and the tree that finds it.
ARENA = layout.EPT_PML4 & ~0xFFFF
FIRST_FREE = (max(layout.TABLES) - ARENA) // layout.PAGE + 1
FRAMES = FIRST_FREE + 64
VCPU = np.int64(0)
VCPU_FRAME = frames.FIRST_VCPU_FRAME

# A 64-bit supervisor-mode guest with CR0.WP and EFER.NXE, as guest/main.c leaves one.
CR0, CR4, EFER, CPL = 0x8001_0033, 0x0004_2620, 0xD00, 0


def evaluate(vectors: Sequence[Vector], processor: Processor) -> list[Outcome]:
    """Run the vectors on the engine as the processor that Bochs emulates; one outcome each, in order."""
    machine = EngineMachine(processor)
    return [machine.run(vector) for vector in vectors]


class EngineMachine:
    """One engine machine, put back to ``layout.base_memory()`` after each vector."""

    def __init__(self, processor: Processor) -> None:
        width = processor.maxphyaddr
        caps = np.zeros(frames.CAPS, dtype=np.int64)
        caps[frames.CAP_ARENA] = ARENA
        caps[frames.CAP_RESERVED_ADDRESS] = ((1 << 52) - 1) & ~((1 << width) - 1)
        caps[frames.CAP_EPT_VPID] = signed(processor.ept_vpid_cap)
        caps[frames.CAP_SECONDARY_ALLOWED] = processor.procbased_ctls2 >> 32
        caps[frames.CAP_SPP_EXECUTE_ONLY] = 1  # the manual lets both pass; Bochs 2.7 has it so
        caps[frames.CAP_VCPUS] = 1
        row_of = np.full(FRAMES, -1, dtype=np.int64)
        tables = [(table - ARENA) // layout.PAGE for table in layout.TABLES]
        own = np.array([frames.STATE_FRAME, VCPU_FRAME, *tables])
        row_of[own] = own
        free = np.arange(FIRST_FREE, FRAMES, dtype=np.int64)
        self.machine = frames.Machine(
            rows=np.zeros((FRAMES, frames.WORDS), dtype=np.int64),
            row_of=row_of,
            fresh=np.ones(FRAMES, dtype=np.uint8),
            kind=np.full(FRAMES, frames.CLIENT, dtype=np.uint8),
            free=free,
            spare=free.copy(),
            top=np.array([len(free), len(free)], dtype=np.int64),
            caps=caps,
            vcpu_of_id=np.zeros(1, dtype=np.int64),
            slots=np.zeros((0, SLOT_WORDS), dtype=np.int64),
            cache=np.full(CACHE_WORDS, EMPTY, dtype=np.int64),
            tlb=tlb.no_table(),
            queues=np.zeros((0, 2, frames.QUEUE_WORDS), dtype=np.int64),
            places=np.full(frames.MOST_PAGES, frames.NO_PLACE, dtype=np.int64),
            lost=np.zeros(1, dtype=np.int64),
        )
        self.base = layout.base_memory()
        pages = {*layout.TABLES, layout.TEST_PT, *(address & -layout.PAGE for address in self.base)}
        self.views = {page: self.view(page) for page in sorted(pages)}
        self.store(self.base)
        first: dict[np.int64, int] = {ctl.V_PRIMARY: ctl.PRIMARY_SECONDARY, ctl.V_CR3: layout.GUEST_PML4}
        first |= {ctl.V_CR0: CR0, ctl.V_CR4: CR4, ctl.V_EFER: EFER, ctl.V_CPL: CPL}
        self.set_vcpu(first)

    def set_vcpu(self, words: Mapping[np.int64, int]) -> None:
        """Set words of the vCPU record."""
        record = self.machine.rows[self.machine.row_of[VCPU_FRAME]]
        for word, value in words.items():
            record[word] = signed(value)

    def view(self, page: int) -> NDArray[np.int64]:
        """The 512 words of a page of tables or guest memory, in place: the machine owns the rows of all of them."""
        m = self.machine
        if page >= ARENA:
            row = m.row_of[(page - ARENA) // layout.PAGE]
        else:
            row = page_contents.own_content_row(m, np.int64(page // layout.PAGE))
        view: NDArray[np.int64] = m.rows[row]
        return view

    def store(self, words: Mapping[int, int]) -> None:
        """Store 64-bit words by address."""
        for address, value in words.items():
            self.views[address & -layout.PAGE][address % layout.PAGE // 8] = signed(value)

    def load(self, address: int) -> int:
        """The word at an address."""
        return unsigned(self.views[address & -layout.PAGE][address % layout.PAGE // 8])

    def run(self, vector: Vector) -> Outcome:
        """Store the vector's words, enter the guest for its access, and say what became of it."""
        words = vector.memory()
        self.store(words)
        self.set_vcpu({ctl.V_EPTP: vector.eptp, ctl.V_SPPTP: vector.spptp, ctl.V_SECONDARY: vector.secondary})
        error = int(control_checks.vm_entry(self.machine, VCPU))
        outcome = Outcome(Event.ENTRY_FAILED, reason=error) if error else self.access(vector, words)
        self.store({address: self.base.get(address, 0) for address in words})
        return outcome

    def access(self, vector: Vector, words: Mapping[int, int]) -> Outcome:
        """Make the access of a vector whose words are stored."""
        how = np.int64(describe(vector.kind))
        result = instruction.access(self.machine, VCPU, np.int64(vector.linear), np.int64(vector.size), how)
        now = {address: self.load(address) for address in words}
        changed = tuple(sorted((address, word) for address, word in now.items() if word != words[address]))
        reason = int(result.reason)
        if reason < 0:
            code = int(result.error_code)
            return Outcome(Event.EXCEPTION, -reason, gla=unsigned(result.gla), error_code=code, changed=changed)
        if reason:
            q, gpa, gla = unsigned(result.qualification), unsigned(result.gpa), unsigned(result.gla)
            return Outcome(Event.EXIT, reason, q, gpa, gla, changed=changed)
        return Outcome(Event.COMPLETED, landed=vector.stored, changed=changed)


def describe(kind: Kind) -> int:
    """The engine's word for an access by this instruction."""
    if kind in READ_MODIFY_WRITES:
        return acc.describe(acc.WRITE, acc.READ_MODIFY_WRITE)
    return acc.describe({Kind.READ: acc.READ, Kind.WRITE: acc.WRITE, Kind.FETCH: acc.EXECUTE}[kind])
