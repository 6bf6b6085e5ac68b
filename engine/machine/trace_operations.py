"""What a trace has between its accesses, executed: hypercalls by the functions that serve them over HTTP, loads of CR3
and INVLPG by those of the processor. And which of them should have removed a translation that proved stale.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from engine.arch import controls as ctl
from engine.arch import exits
from engine.arch import paging as guest
from engine.arch.words import signed, unsigned
from engine.cpu import control_registers, instruction, tlb
from engine.cpu.frames import FIRST_VCPU_FRAME, Machine, write_word
from engine.errors import InvalidValue, TraceError
from engine.hyperv.caller import Caller
from engine.kvm import resolutions as res
from engine.kvm.exit_handling import count_exit, handle_exit
from engine.kvm.vcpu_run import MAX_EXITS
from engine.machine.hypercalls import HypercallRequest, execute_hypercall
from engine.machine.hyperv_vps import enter
from engine.machine.missed_flushes import Done, Place, explanation, nearest, told
from engine.machine.nested_states import record_of
from engine.machine.state import Change
from engine.state.frame_store import Draft
from engine.state.retry import new_trail
from engine.trace import translated
from engine.trace.operations import HYPERCALL, INVLPG, MOV_CR3, OP_NAMES, Operation, hypercall_of, operand_of
from engine.trace.translations import MOST_LISTED, PerformedOperation, StaleTranslation, Translations

# Operations that are looked through for the one that missed a translation: the last ones.
MOST_SEARCHED = 4096

_SPACE_RULE = "an address space is a value that CR3 can have"


class TraceOperations:
    """The operations of one replay; see ``trace.timed.Performs``. Everything happens in the replay's own change."""

    def __init__(self, change: Change) -> None:
        self._change = change
        self._counts = dict.fromkeys(OP_NAMES[1:], 0)
        self._done: deque[Done] = deque(maxlen=MOST_SEARCHED)
        self._performed: list[PerformedOperation] = []
        self._stale: list[StaleTranslation] = []

    def go_on(self, draft: Draft) -> None:
        """What comes is part of another change."""
        assert isinstance(draft, Change)
        self._change = draft

    def perform(self, index: int, vcpu: int, operation: Operation, tally: NDArray[np.int64]) -> None:
        """Execute the operation of record ``index`` on the vCPU of that id. Raises TraceError."""
        position = int(self._change.machine.vcpu_of_id[vcpu])
        self._take_space(index, position, operation)
        if operation.op == HYPERCALL:
            done, performed = self._hypercall(index, vcpu, position, operation)
        else:
            enter(self._change, vcpu)
            self._change.ensure()
            before = _live(self._change.machine)
            done = (self._mov_cr3 if operation.op == MOV_CR3 else self._invlpg)(index, position, operation, tally)
            dropped = before - _live(self._change.machine)
            own, operand = (self._vp_index(vcpu),), operand_of(operation)
            reached = own if dropped else ()
            performed = PerformedOperation(
                index, vcpu, operation.name, operand, done.outcome, None, own, reached, dropped, 0
            )
        self._counts[operation.name] += 1
        self._done.append(done)
        if len(self._performed) < MOST_LISTED:
            self._performed.append(performed)

    def _take_space(self, index: int, position: int, operation: Operation) -> None:
        """Make the record's address space that of the vCPU, where it is not the operand itself."""
        space = operation.address_space
        if space is None or (operation.op == MOV_CR3 and operation.arg is None):
            return
        self._change.ensure()
        m = self._change.machine
        if not translated.fits_space(m, np.int64(signed(space))):
            raise TraceError(_SPACE_RULE, index=index, field="address_space", value=space)
        write_word(m, FIRST_VCPU_FRAME + position, ctl.V_CR3, signed(space))

    def _hypercall(self, index: int, vcpu: int, position: int, operation: Operation) -> tuple[Done, PerformedOperation]:
        given = hypercall_of(operation)
        caller = Caller(rcx=given.rcx, rdx=given.rdx, r8=given.r8, xmm=given.xmm)
        request = HypercallRequest(registers=caller, input=given.block, long_mode=True)
        try:
            outcome = execute_hypercall(self._change, vcpu, request).outcome
        except InvalidValue as error:
            raise TraceError(error.rule, index=index, field="arg", value=hex(given.rdx)) from None
        performed = PerformedOperation(
            index,
            vcpu,
            operation.name,
            given.rcx,
            outcome.outcome,
            outcome.result,
            outcome.targeted,
            outcome.flushed,
            sum(len(effect.dropped) for effect in outcome.effects),
            sum(len(effect.left) for effect in outcome.effects),
        )
        return Done.hypercall(index, position, outcome), performed

    def _mov_cr3(self, index: int, position: int, operation: Operation, tally: NDArray[np.int64]) -> Done:
        """MOV to CR3; KVM handles the exits of the reads that PAE paging makes."""
        operand, trail = np.int64(signed(operand_of(operation))), new_trail()
        for _ in range(MAX_EXITS):
            self._change.ensure()
            m = self._change.machine
            reason, value, gpa = (int(x) for x in control_registers.move_to_cr3(m, position, operand, trail))
            if reason <= exits.NONE:
                break
            count_exit(tally, reason, value)
            how, at = control_registers.LOAD_PDPTE, np.int64(gpa)
            if handle_exit(m, position, at, how, reason, value, 0, trail, tally) > res.LAST_INTERNAL:
                break
        outcome = "completed" if reason == exits.NONE else "exception" if reason < exits.NONE else "exit"
        keeps = outcome == "completed" and bool(operand & guest.CR3_KEEP)
        return Done(index, MOV_CR3, position, outcome, "the load of CR3", keeps=keeps)

    def _invlpg(self, index: int, position: int, operation: Operation, tally: NDArray[np.int64]) -> Done:
        """INVLPG; of an address that cannot be one it does nothing."""
        del tally
        m, given = self._change.machine, np.int64(signed(operand_of(operation)))
        linear = np.int64(instruction.effective(m, position, given))
        if instruction.canonical(m, position, linear):
            tlb.invlpg(m, position, linear)
        return Done(index, INVLPG, position, "completed", "the INVLPG", page=int(linear) >> 12)

    def explain(self, row: NDArray[np.int64]) -> None:
        """List a stale translation as ``trace.translated`` noted it."""
        if len(self._stale) == MOST_LISTED:
            return
        word = int(row[translated.F_RECORD])
        vcpu = word >> 32 & 0xFFFF
        made, after = int(row[translated.F_MADE]), int(row[translated.F_AFTER])
        place = Place(
            position=int(row[translated.F_VCPU]),
            vp_index=self._vp_index(vcpu),
            page=int(row[translated.F_GVA]) >> 12,
            space=int(row[translated.F_SPACE]),
            after=max(made, after),
            index=int(row[translated.F_INDEX]),
        )
        missed = nearest(self._done, place)
        self._stale.append(
            StaleTranslation(
                index=place.index,
                vcpu=vcpu,
                vp_index=place.vp_index,
                gva=unsigned(row[translated.F_GVA]),
                address_space=place.space,
                size=word & 0xFFFF,
                access=word >> 16 & 0xFF,
                gpa=int(row[translated.F_GPA]),
                cached_gpa=int(row[translated.F_CACHED]),
                cached_at=None if made < 0 else made,
                changed_after=None if after < 0 else after,
                missed_by=None if missed is None else told(missed, place),
                explanation=explanation(missed, place),
            )
        )

    def translations(self, stale: int) -> Translations:
        """Everything so far; ``stale`` accesses went by stale translations."""
        performed = sum(self._counts.values())
        return Translations(
            stale=stale,
            operations=dict(self._counts),
            stale_records=tuple(self._stale),
            stale_dropped=stale - len({item.index for item in self._stale}),
            operation_records=tuple(self._performed),
            operations_dropped=performed - len(self._performed),
        )

    def _vp_index(self, vcpu: int) -> int:
        return record_of(self._change.config, self._change.nested, vcpu).vp_index


def _live(m: Machine) -> int:
    """How many translations there are."""
    return int(np.count_nonzero(m.tlb[1:, tlb.E_GENERATION] == m.tlb[0, tlb.GENERATION]))
