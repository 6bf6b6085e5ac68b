"""One hypercall from the instruction to its result: who takes it, which flush it is, what that does.

The rules are in the modules beside this one; here is their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.arch import hypercall as hv
from engine.cpu.frames import Machine
from engine.hyperv import flush_execution, kvm_rules, l2_hypercalls, tlb_locks, tlfs_rules
from engine.hyperv.caller import Caller
from engine.hyperv.flush_execution import Effect, Facts, Marks, Scope, Vp
from engine.hyperv.flush_or_refusal import Flush, Intercepted, Reading, Refused, SecondLevelFlush, Undefined
from engine.hyperv.kvm_rules import Translate
from engine.hyperv.outcome import Outcome
from engine.hyperv.privileges import Privileges
from engine.hyperv.tlfs_rules import Environment
from engine.kvm.memory_views import ReadsMemory


@dataclass(frozen=True)
class HypercallContext:
    """Everything around a call but its registers.

    ``guest`` is the nested guest that calls, None when the caller is the machine's own guest. ``translate`` turns a
    GPA of L2 into one of L1 and is there under nested paging. ``locked`` are the VPs whose TLB is locked.
    ``l0`` is ``hyperv`` when KVM itself runs on it; then the machine's guest is L2, and ``tagged`` is False.
    """

    machine: Machine
    memory: ReadsMemory
    partition_memory: ReadsMemory
    privileges: Privileges
    vps: Sequence[Vp]
    policy: str = "kvm"
    environment: Environment = field(default_factory=Environment)
    facts: Facts = field(default_factory=Facts)
    guest: l2_hypercalls.NestedGuest | None = None
    translate: Translate | None = None
    locked: frozenset[int] = frozenset()
    l0: str = "kvm"
    tagged: bool = True


def hypercall(caller: Caller, at: HypercallContext) -> Outcome:
    """VMCALL or VMMCALL with these registers. Changes the machine's caches, queues and statistics."""
    caller.validate()
    blank = Outcome(at.l0, 1 if at.guest is None else 2, "completed", caller.control)
    if at.guest is None:
        return _own(caller, at, blank)
    route = l2_hypercalls.route(caller, at.privileges, at.guest)
    blank = replace(blank, row=route.row)
    if not route.served:
        to_l1 = l2_hypercalls.reflected(at.guest)
        if to_l1 is not None:
            return replace(blank, outcome="reflected", exit=to_l1)
    if not at.privileges.enabled and at.policy == "kvm" and route.row != "D6":
        return replace(_native(caller, blank), row="D7")
    return _after_flush(at, _serve(caller, at, Scope(at.guest.vm_id, at.tagged), blank))


def hypercall_on_hyperv(caller: Caller, below: HypercallContext, own: HypercallContext) -> Outcome:
    """VMCALL by the guest of a KVM that runs on Hyper-V: served ``below`` by Hyper-V, or, after an exit, by KVM."""
    done = hypercall(caller, below)
    if done.outcome != "reflected":
        return done
    answered = hypercall(caller, own)
    return replace(answered, l0=done.l0, level=done.level, row=done.row, exit=done.exit, served_by=1)


def _own(caller: Caller, at: HypercallContext, blank: Outcome) -> Outcome:
    if not at.privileges.enabled and at.policy == "kvm":
        return _native(caller, blank)
    return _serve(caller, at, Scope(), blank)


def _native(caller: Caller, blank: Outcome) -> Outcome:
    return replace(blank, outcome="native", registers=caller.native_result(), served_by=0)


def _serve(caller: Caller, at: HypercallContext, scope: Scope, blank: Outcome) -> Outcome:
    reading = _read(caller, at, at.policy)
    if isinstance(reading, Undefined):
        return replace(blank, outcome="exception")
    if isinstance(reading, Intercepted):
        return replace(blank, outcome="intercepted", intercepted_gpa=reading.gpa)
    if isinstance(reading, Refused):
        return _completed(caller, blank, reading.result, ())
    blank = replace(blank, flush=reading)
    waits_for = tlb_locks.holders(reading, scope, at.vps, at.locked)
    if waits_for:
        return replace(blank, outcome="suspended", waits_for=waits_for)
    return _completed(caller, blank, reading.result, tuple(_execute(caller, at, scope, reading)))


def _read(caller: Caller, at: HypercallContext, policy: str) -> Reading:
    if policy == "tlfs":
        return tlfs_rules.read(caller, at.privileges, at.memory, at.environment, at.translate)
    return kvm_rules.read(caller, at.privileges, at.memory, at.facts.lists, at.translate)


def _execute(caller: Caller, at: HypercallContext, scope: Scope, flush: Flush | SecondLevelFlush) -> list[Effect]:
    if isinstance(flush, SecondLevelFlush):
        return flush_execution.execute_second_level(at.machine, flush, at.vps, at.facts)
    return flush_execution.execute(at.machine, flush, scope, at.vps, at.facts, _rule(caller, at, scope))


def _rule(caller: Caller, at: HypercallContext, scope: Scope) -> Marks | None:
    """What the specification requires of the call, where it takes it for a flush at all."""
    if at.policy == "tlfs":
        return None
    reading = _read(caller, at, "tlfs")
    return flush_execution.required(at.machine, reading, scope, at.vps) if isinstance(reading, Flush) else None


def _completed(caller: Caller, blank: Outcome, result: int, effects: tuple[Effect, ...]) -> Outcome:
    registers = caller.result_registers(result)
    return replace(blank, result=result, registers=registers, effects=effects, served_by=0)


def _after_flush(at: HypercallContext, done: Outcome) -> Outcome:
    """Rows D6 to D11: after a flush for L2, L0 looks whether L1 wants to hear of it."""
    if done.outcome == "exception":
        return replace(done, row="D6")
    if done.outcome != "completed" or done.result is None or hv.status_of(done.result) != hv.Status.SUCCESS:
        return done
    assert at.guest is not None
    page = at.partition_memory.read(at.guest.assist_page, 4)
    if page is None:
        return _unreadable(done)
    if not any(page):
        return replace(done, row="D10")
    return replace(done, row="D11", exit=l2_hypercalls.after_flush(at.guest))


def _unreadable(done: Outcome) -> Outcome:
    """The flush stands, its result does not: KVM finds out only now that the page cannot be read."""
    result = hv.result_value(hv.Status.INVALID_HYPERCALL_INPUT)
    wide = "rdx" not in done.registers
    return replace(done, row="D9", result=result, registers={"rax": result} if wide else {"rdx": 0, "rax": result})
