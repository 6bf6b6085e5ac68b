"""KVM_SET_NESTED_STATE: every step in order, as one table for both kernels.

A step either lets the call go on or ends it. Steps V1 to V8 and the generic ones before them leave the old state
alone. V9 leaves nested mode, and what fails after that leaves a partly applied new state behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.abi import UserBuffer
from engine.arch import kvm_nested_state as abi
from engine.arch.vmcs12 import VMCS12, get
from engine.kvm.memory_views import GuestMemory, TrialMemory
from engine.nested import svm
from engine.nested.entry_checks import explain_checks, first_failure
from engine.nested.entry_context import is_shadow, revision_matches
from engine.nested.set_context import SetContext
from engine.nested.set_facts import facts_of
from engine.nested.transitions import enter_guest, enter_operation, leave_nested
from engine.nested.verdict import CheckReport, Facts, SetResult, Verdict
from engine.state.profiles import ONLY_2019, ONLY_LATEST, PROFILES, ProfileName
from engine.vcpu.vcpu import EVMPTR_PENDING, Vcpu

_INTEL = ("intel",)
_AMD = ("amd",)
_ANY = ("intel", "amd")

_SMM_KNOWN = abi.SMM_GUEST_MODE | abi.SMM_VMXON


@dataclass(frozen=True)
class Step:
    """One row: ``says`` is what the step refuses or does; ``run`` returns None to go on."""

    check: str
    says: str
    run: Callable[[SetContext], Verdict | None]
    profiles: tuple[ProfileName, ...] = PROFILES
    effect: bool = False
    vendors: tuple[str, ...] = _INTEL


def _refuse(condition: Callable[[SetContext], bool]) -> Callable[[SetContext], Verdict | None]:
    return lambda c: Verdict("EINVAL") if condition(c) else None


def _vmx_off(condition: Callable[[SetContext], bool]) -> Callable[[SetContext], Verdict | None]:
    return _refuse(lambda c: c.vmxon_pa == abi.NO_ADDRESS and condition(c))


def _vmx_on(condition: Callable[[SetContext], bool]) -> Callable[[SetContext], Verdict | None]:
    return _refuse(lambda c: c.vmxon_pa != abi.NO_ADDRESS and condition(c))


def _no_hook(c: SetContext) -> bool:
    return not c.vcpu.kvm.nested.hooks_always and not (c.vcpu.host.intel and c.vcpu.host.nested)


def _copy_header(c: SetContext) -> Verdict | None:
    header = c.user.copy_from(0, abi.HEADER_SIZE)
    if header is None:
        return Verdict("EFAULT")
    c.header = header
    return None


def _svm(c: SetContext) -> Verdict | None:
    verdict = svm.set_state(c.vcpu, c.header, c.user, c.parts)
    c.blamed = next((part for part in c.parts or () if part.outcome == "decides"), None)
    return verdict


def _smm_conflict(c: SetContext) -> bool:
    if c.vcpu.smm:
        return bool(c.flags & (abi.GUEST_MODE | abi.RUN_PENDING))
    return bool(c.smm_flags)


def _evmcs_refused(c: SetContext) -> bool:
    return bool(c.flags & abi.EVMCS) and not (c.vcpu.vmx_allowed and c.vcpu.evmcs_enabled)


def _leave(c: SetContext) -> Verdict | None:
    leave_nested(c.vcpu, c.memory)
    return None


def _vmxon(c: SetContext) -> Verdict | None:
    c.vcpu.allocations += 1
    if c.vcpu.fail_allocation:
        c.vcpu.fail_allocation = False
        return Verdict("ENOMEM")
    enter_operation(c.vcpu.vmx, c.vmxon_pa)
    return None


def _short_2019(c: SetContext) -> Verdict | None:
    return Verdict() if c.size < abi.MIN_SIZE_VMCS12 else None


def _short_latest(c: SetContext) -> Verdict | None:
    if c.size >= abi.MIN_SIZE_VMCS12:
        return None
    names_vmcs = c.flags & (abi.GUEST_MODE | abi.EVMCS) or c.vmcs12_pa != abi.NO_ADDRESS
    return Verdict("EINVAL") if names_vmcs else Verdict()


def _current(c: SetContext) -> Verdict | None:
    if c.vmcs12_pa == abi.NO_ADDRESS:
        return None
    if c.vmcs12_pa == c.vmxon_pa or not c.vcpu.page_valid(c.vmcs12_pa):
        return Verdict("EINVAL")
    c.vcpu.vmx.current_pa = c.vmcs12_pa
    c.vcpu.vmx.sync_pending = c.vcpu.host.shadow_vmcs
    return None


def _evmcs_mark(c: SetContext) -> Verdict | None:
    if c.vmcs12_pa != abi.NO_ADDRESS:
        return None
    if not c.flags & abi.EVMCS:
        return Verdict("EINVAL")
    if c.vcpu.kvm.nested.map_pending:
        c.vcpu.vmx.evmptr = EVMPTR_PENDING
        c.vcpu.vmx.pages_pending = True
    else:
        c.vcpu.vmx.sync_pending = True
    return None


def _smm_state(c: SetContext) -> Verdict | None:
    if c.smm_flags & abi.SMM_VMXON:
        c.vcpu.vmx.smm_vmxon, c.vcpu.vmx.vmxon = True, False
        if c.smm_flags & abi.SMM_GUEST_MODE:
            c.vcpu.vmx.smm_guest_mode = True
    return None


def _copy_vmcs12(c: SetContext) -> Verdict | None:
    return None if c.user.copy_into(c.vcpu.vmx.vmcs12, abi.DATA_OFFSET, VMCS12.size) else Verdict("EFAULT")


def _pending(c: SetContext) -> Verdict | None:
    c.vcpu.vmx.run_pending = bool(c.flags & abi.RUN_PENDING)
    if c.vcpu.kvm.nested.reports_timer:
        c.vcpu.vmx.mtf_pending = bool(c.flags & abi.MTF_PENDING)
    return None


def _late(run: Callable[[SetContext], Verdict | None]) -> Callable[[SetContext], Verdict | None]:
    """A step after which a failure forgets that a run was pending."""

    def guarded(c: SetContext) -> Verdict | None:
        verdict = run(c)
        if verdict is not None and (verdict.errno or verdict.returns):
            c.vcpu.vmx.run_pending = False
        return verdict

    return guarded


def _shadow_size(c: SetContext) -> Verdict | None:
    short = c.shadow_in_use and c.size < abi.MIN_SIZE_SHADOW
    return Verdict("EINVAL", detail="shadow size") if short else None


def _shadow_copy(c: SetContext) -> Verdict | None:
    if not c.shadow_in_use or c.user.copy_into(c.vcpu.vmx.shadow, abi.SHADOW_OFFSET, VMCS12.size):
        return None
    return Verdict("EFAULT", detail="shadow copy")


def _shadow_header(c: SetContext) -> Verdict | None:
    word = get(c.vcpu.vmx.shadow, "revision")
    wrong = c.shadow_in_use and not (revision_matches(word) and is_shadow(word))
    return Verdict("EINVAL", detail="shadow hdr") if wrong else None


def _deadline(c: SetContext) -> Verdict | None:
    known = c.vmx("flags") & abi.TIMER_DEADLINE
    c.vcpu.vmx.deadline = c.vmx("preemption_timer_deadline") if known else None
    return None


def _entry_checks(c: SetContext) -> Verdict | None:
    if c.parts is not None:
        c.parts.extend(explain_checks(c.vcpu, c.memory))
        c.blamed = next((part for part in c.parts if part.outcome == "decides"), None)
    failed = first_failure(c.vcpu, c.memory)
    return None if failed is None else Verdict("EINVAL", detail=failed.name, says=f"needs {failed.says}")


def _enter(c: SetContext) -> Verdict | None:
    if not c.vcpu.kvm.nested.reports_timer:
        c.vcpu.vmx.deadline = None
    refused = enter_guest(c.vcpu, c.memory, from_vm_entry=False)
    return None if refused is None else Verdict(returns=c.vcpu.kvm.nested.entry_failure, detail=refused)


STEPS: tuple[Step, ...] = (
    Step("G0", "nested state is not implemented by this host", _refuse(_no_hook), vendors=_ANY),
    Step("G1", "the 128-byte header cannot be read", _copy_header, vendors=_ANY),
    Step("G2", "size is less than 128", _refuse(lambda c: c.size < abi.HEADER_SIZE), vendors=_ANY),
    Step(
        "G3", "flags has an unknown bit", _refuse(lambda c: bool(c.flags & ~c.vcpu.kvm.nested.flags_mask)), vendors=_ANY
    ),
    Step("G4", "RUN_PENDING without GUEST_MODE", _refuse(lambda c: c.flags & 3 == abi.RUN_PENDING), vendors=_ANY),
    Step("SVM", "the host is AMD: the steps of SVM decide", _svm, ONLY_LATEST, effect=True, vendors=_AMD),
    Step("V1", "format is not 0", _refuse(lambda c: c.format != abi.FORMAT_VMX)),
    Step("V2a", "vmxon_pa is -1 and smm.flags is not 0", _vmx_off(lambda c: bool(c.smm_flags))),
    Step("V2b", "vmxon_pa is -1 and vmcs12_pa is not", _vmx_off(lambda c: c.vmcs12_pa != abi.NO_ADDRESS)),
    Step("V2c", "vmxon_pa is -1 and flags has more than EVMCS", _vmx_off(lambda c: bool(c.flags & ~abi.EVMCS))),
    Step("V3a", "vmxon_pa is given and the guest has no VMX", _vmx_on(lambda c: not c.vcpu.vmx_allowed)),
    Step("V3b", "vmxon_pa is not a page address", _vmx_on(lambda c: not c.vcpu.page_valid(c.vmxon_pa))),
    Step(
        "V4",
        "L2 both running and interrupted by SMM",
        _refuse(lambda c: bool(c.smm_flags & abi.SMM_GUEST_MODE and c.flags & abi.GUEST_MODE)),
    ),
    Step("V5", "smm.flags has an unknown bit", _refuse(lambda c: bool(c.smm_flags & ~_SMM_KNOWN))),
    Step(
        "V5n",
        "hdr.vmx.flags has an unknown bit",
        _refuse(lambda c: bool(c.vmx("flags") & ~abi.TIMER_DEADLINE)),
        ONLY_LATEST,
    ),
    Step("V6", "L2 running or pending in SMM, or smm.flags outside SMM", _refuse(_smm_conflict)),
    Step(
        "V7",
        "SMM interrupted L2 but not VMX operation",
        _refuse(lambda c: c.smm_flags & _SMM_KNOWN == abi.SMM_GUEST_MODE),
    ),
    Step(
        "V8", "EVMCS without VMX in the guest or without the capability enabled on this vCPU", _refuse(_evmcs_refused)
    ),
    Step("V9", "leaves nested mode: the old state is gone", _leave, effect=True),
    Step("V10", "vmxon_pa is -1: done", lambda c: Verdict() if c.vmxon_pa == abi.NO_ADDRESS else None),
    Step("V11", "enters VMX operation; memory for it may be missing", _vmxon, effect=True),
    Step("V12", "size is too short for a vmcs12: done, whatever the header says", _short_2019, ONLY_2019),
    Step("V12n", "size is too short for a vmcs12: done, refused if the header names one", _short_latest, ONLY_LATEST),
    Step("V13", "vmcs12_pa equals vmxon_pa or is not a page address", _current),
    Step("V14", "no vmcs12_pa and no EVMCS", _evmcs_mark),
    Step("V15", "moves VMX operation under SMM", _smm_state, effect=True),
    Step("V16", "the vmcs12 cannot be read", _copy_vmcs12),
    Step(
        "V17",
        "vmcs12 has another revision",
        _refuse(lambda c: not revision_matches(get(c.vcpu.vmx.vmcs12, "revision"))),
    ),
    Step("V18", "GUEST_MODE is clear: done", lambda c: None if c.flags & abi.GUEST_MODE else Verdict()),
    Step("V19", "notes what is pending", _pending, effect=True),
    Step("V20a", "size is too short for the shadow vmcs12", _late(_shadow_size)),
    Step("V20b", "the shadow vmcs12 cannot be read", _late(_shadow_copy)),
    Step("V20c", "the shadow vmcs12 has another revision or no shadow bit", _late(_shadow_header), ONLY_2019),
    Step("V20d", "notes the preemption timer deadline", _deadline, ONLY_LATEST, effect=True),
    Step("V20c", "the shadow vmcs12 has another revision or no shadow bit", _late(_shadow_header), ONLY_LATEST),
    Step("V21", "a VM-entry check refuses the vmcs12", _late(_entry_checks)),
    Step("V22", "entering L2 fails", _late(_enter)),
    Step("V23", "L2 is entered: done", lambda c: Verdict()),
)


def steps_of(profile: str, vendor: str = "intel") -> tuple[Step, ...]:
    """The steps that the kernel of ``profile`` makes on a host of ``vendor``, in order."""
    return tuple(step for step in STEPS if profile in step.profiles and vendor in step.vendors)


def set_nested_state(vcpu: Vcpu, memory: GuestMemory, user: UserBuffer, *, explain: bool = False) -> SetResult:
    """KVM_SET_NESTED_STATE with the blob in ``user``. Changes ``vcpu``, also when it fails after V9.

    With ``explain`` the result also has the ``parts`` of the steps V21 and SVM.
    """
    context = SetContext(vcpu, memory, user, explain)
    trail: list[CheckReport] = []
    decided: tuple[Step, Verdict] | None = None
    for step in steps_of(vcpu.profile, vcpu.host.vendor):
        if decided is not None:
            trail.append(_report(context, step, "not reached"))
            continue
        verdict = step.run(context)
        if verdict is None:
            trail.append(_report(context, step, "done" if step.effect else "pass"))
        else:
            decided = step, verdict
            trail.append(_report(context, step, "decides", verdict.detail))
    if decided is None:
        raise AssertionError("the last step always decides")
    step, verdict = decided
    check, detail = step.check, verdict.detail
    if check == "SVM" and detail is not None:
        check, _, rest = detail.partition(" ")
        detail = rest or None
    returns = -1 if verdict.errno else verdict.returns
    says = verdict.says or step.says
    blamed = context.blamed or next(report for report in trail if report.outcome == "decides")
    return SetResult(
        returns,
        verdict.errno,
        check,
        detail,
        says,
        tuple(trail),
        tuple(context.parts or ()),
        blamed.field,
        blamed.found,
        blamed.required,
    )


def _report(c: SetContext, step: Step, outcome: str, detail: str | None = None) -> CheckReport:
    """What became of a step. One that let the call go on is told by what it asks for, not by what it refuses."""
    if step.check in ("SVM", "V21"):
        facts = Facts() if c.blamed is None or outcome != "decides" else Facts.of(c.blamed)
    else:
        facts = facts_of(c, step.check, reached=outcome != "not reached")
    refuses = not step.effect and outcome != "decides" and facts.required is not None
    says = f"needs {facts.required}" if refuses else step.says
    return CheckReport(step.check, says, outcome, detail, facts.field, facts.found, facts.required)


def explain_nested_state(vcpu: Vcpu, memory: GuestMemory, user: UserBuffer) -> tuple[SetResult, Vcpu]:
    """The same without applying anything: the result, and the vCPU as the call would leave it."""
    twin = vcpu.copy()
    return set_nested_state(twin, TrialMemory(memory), user, explain=True), twin
