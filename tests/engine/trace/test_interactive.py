"""Replays and accesses that ask: always the same answer comes to what the kernel does under that name; and the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from engine.errors import InvalidValue, LimitExceeded, TraceError
from engine.kvm.protections import ProtectedObject
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.page_access import AccessChange
from engine.state.config import HostConfig
from engine.trace import interactive
from engine.trace.columns import TraceChunk
from engine.trace.interactive import InteractiveReplay
from engine.trace.interactive_access import InteractiveAccess
from engine.trace.published import PublishedReplay
from engine.trace.results import ExitColumns, TraceResult
from engine.trace.session import ReplayOptions
from engine.trace.single import AccessRequest, AccessResult
from tests.engine.builders import (
    EXECUTE,
    FULL,
    MIB,
    PROFILES,
    READ,
    assert_sound,
    chunk,
    exits,
    machine,
    maps,
    picture,
    protect,
    replay,
    set_map,
    totals,
    unchanged,
)

Policy = Callable[[VirtualMachine, ExitColumns], str]

# Page 5 allows sub-pages 0 to 3 only, page 6 has an object, page 7 is not executable; page 9 is free; the hole has no
# memory; 0x300000 is read-only.
READ_WRITE = 3
OPEN, SHUT, LATER, HOLE, FIXED = 0x9000, 0x5200, 0x5F80, 1 << 30, 0x30_0000
ROWS: Sequence[Any] = (
    OPEN,
    SHUT,
    (SHUT, 8, READ),
    (0x5FFC, 8),  # into page 6
    HOLE,
    SHUT,
    (SHUT + 4, 1),
    FIXED,
    (LATER, 128),
    (SHUT, 8, EXECUTE),
    (0x7000, 8, EXECUTE),
    LATER,
    OPEN,
)


def make(profile: str = "kvm-2019", **options: Any) -> VirtualMachine:
    slots = (SlotSpec(0, 0, 3 * MIB), SlotSpec(1, 3 * MIB, MIB, read_only=True))
    vm = machine(profile, slots=slots, **options)
    set_map(vm, 5, 0xF)
    set_map(vm, 0x300, 0xF)
    protect(vm, "secret", (0x6010, 16), (0x5F90, 8))
    vm.page_access.set([AccessChange(7, READ_WRITE)])
    vm.vcpus.set_vmcs(0, {"cr0": 0x33})  # paging is off: linear addresses are physical ones
    return vm


def ask(vm: VirtualMachine, policy: Policy, *chunks: Any, most: int | None = None, **options: Any) -> TraceResult:
    """Replay with ``ask``; ``policy`` answers, and may change the machine before it does.

    With ``most``, each answer and so many records are a transaction, and what is left of the chunk another one.
    """
    asked = ReplayOptions(on_violation="ask", **options)
    parts = iter([part if isinstance(part, TraceChunk) else chunk(part) for part in chunks])
    run_of: InteractiveReplay | None = None
    action: str | None = None
    while True:
        with vm.replay(asked, run_of) as run:
            assert isinstance(run.replay, InteractiveReplay)
            run_of = run.replay
            going = run_of.finish_chunk() if action in (None, "rest") else run_of.answer(action, most)
            if going and most is not None and action not in (None, "rest"):
                run.pause()
                action = "rest"
                continue
            while going and (part := next(parts, None)) is not None:
                going = run.feed(part)
            if run_of.paused_at is None:
                return run.finish()
            question = run_of.asked
            run.pause()
        assert question.column("index").tolist() == [run_of.paused_at]
        action = policy(vm, question)


def always(action: str) -> Policy:
    return lambda vm, question: action


def split(rows: Sequence[Any], at: int) -> list[list[Any]]:
    return [list(rows[:at]), list(rows[at:])]


LISTED = ("index", "reason", "qualification", "gpa", "gva", "denied", "resolution", "stale")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("include", ["violations", "all"])
@pytest.mark.parametrize("action", ["skip", "allow", "grant", "stop"])
@pytest.mark.parametrize("cache", ["off", "model"])
def test_always_the_same_answer(profile: str, include: str, action: str, cache: str) -> None:
    plain, asked = (make(profile, translation_cache=cache) for _ in range(2))
    known = replay(plain, *split(ROWS, 4), on_violation=action, include=include)
    found = ask(asked, always(action), *split(ROWS, 4), include=include)
    assert totals(found) == totals(known) and known.violations >= 1
    assert found.stopped_at == known.stopped_at and (known.stopped_at is None) is (action != "stop")
    assert exits(found, *LISTED) == exits(known, *LISTED)
    assert found.exit_columns.objects() == known.exit_columns.objects()
    assert asked.counters() == plain.counters()
    assert picture(asked) == picture(plain)
    assert_sound(asked)


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("action", ["skip", "allow", "grant", "stop"])
def test_an_answer_and_a_few_records_at_a_time(action: str, most: int) -> None:
    plain, asked = make(), make()
    known = replay(plain, *split(ROWS, 4), on_violation=action)
    found = ask(asked, always(action), *split(ROWS, 4), most=most)
    assert totals(found) == totals(known) and found.stopped_at == known.stopped_at
    assert exits(found, *LISTED) == exits(known, *LISTED)
    assert asked.counters() == plain.counters() and picture(asked) == picture(plain)
    assert_sound(asked)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("first", ["ask", "stop"])
@pytest.mark.parametrize("then", ["ask", "skip"])
def test_going_on_after_a_stop_counts_its_violation_once(profile: str, first: str, then: str) -> None:
    def run(vm: VirtualMachine, on_violation: str, action: str, **options: Any) -> TraceResult:
        if on_violation == "ask":
            return ask(vm, always(action), ROWS, **options)
        return replay(vm, ROWS, on_violation=on_violation, **options)

    whole, vm = make(profile), make(profile)
    known = run(whole, "skip", "skip")
    before = run(vm, first, "stop")
    assert before.stopped_at == 1 and before.violations == 1
    after = run(vm, then, "skip", start=1)
    for name in ("records", "writes", "violations", "page_granular_violations", "mmio"):
        assert getattr(before, name) + getattr(after, name) == getattr(known, name), name
    assert vm.counters()["violations"] == whole.counters()["violations"]


@pytest.mark.parametrize("action", ["skip", "allow", "grant"])
def test_dirty_logs_are_told_as_by_a_replay(action: str) -> None:
    plain, asked = make(), make()
    for vm in (plain, asked):
        vm.dirty.track("page", "write-protect")
    replay(plain, ROWS, on_violation=action)
    ask(asked, always(action), ROWS)
    assert picture(asked) == picture(plain)


def test_internal_errors_are_asked_about_as_stop_stops_at_them() -> None:
    """A host that does not back a page: KVM_RUN itself fails."""
    plain, asked = (make(host=HostConfig(fail_allocation=None)) for _ in range(2))
    for action in ("skip", "grant"):
        known = replay(plain, ROWS, on_violation=action)
        found = ask(asked, always(action), ROWS)
        assert totals(found) == totals(known)


def test_carried_columns_and_gva() -> None:
    plain, asked = make(), make()
    gva = [0xFFFF_8000_0000_0000 + at for at in range(len(ROWS))]
    marks = np.arange(len(ROWS), dtype=np.uint32) * 7
    known = replay(plain, chunk(ROWS, gva, {"mark": marks}), on_violation="skip", carry=("mark",))

    def skip(vm: VirtualMachine, question: ExitColumns) -> str:
        index = int(question.column("index")[0])
        assert question.carry["mark"].tolist() == [7 * index]
        assert int(question.column("gva")[0]) == gva[index]
        return "skip"

    found = ask(asked, skip, chunk(ROWS, gva, {"mark": marks}), carry=("mark",))
    assert found.exit_columns.carry["mark"].tolist() == known.exit_columns.carry["mark"].tolist()
    assert exits(found, *LISTED) == exits(known, *LISTED)


@pytest.mark.parametrize("action", ["allow", "grant", "retry", "stop"])
def test_what_is_published_at_each_question_adds_up(action: str) -> None:
    """Each exit record is handed out once, with what it carries, and the question's own before its answer."""
    asked, plain = make(), make()
    marks = np.arange(len(ROWS), dtype=np.uint32) * 7
    rows = chunk(ROWS, [0] * len(ROWS), {"mark": marks})
    known = ask(plain, again_and_then_allow(action), rows, carry=("mark",))
    options = ReplayOptions(on_violation="ask", published=True, carry=("mark",))
    answer, found, replay_ = again_and_then_allow(action), [], None
    answered: str | None = None
    while True:
        with asked.replay(options, replay_) as run:
            replay_ = run.replay
            assert isinstance(replay_, PublishedReplay)
            going = run.feed(rows) if answered is None else replay_.answer(answered)
            question = replay_.question
            result = replay_.result_from(sum(map(len, found)))
            found.append(result.exit_columns)
            run.pause()
        if question is None:
            break
        assert not going and replay_.resume_at == question.column("index")[0] == result.records
        assert found[-1].column("index")[-1] == replay_.resume_at
        answered = answer(asked, question)
    assert totals(result) == totals(known) and result.by_object == known.by_object
    assert replay_.resume_at == (1 if action == "stop" else len(ROWS))
    for name in LISTED:
        assert (
            np.concatenate([part.column(name) for part in found]).tolist() == known.exit_columns.column(name).tolist()
        )
    assert np.concatenate([part.carry["mark"] for part in found]).tolist() == known.exit_columns.carry["mark"].tolist()
    assert asked.counters() == plain.counters() and picture(asked) == picture(plain)


def again_and_then_allow(action: str) -> Policy:
    """Always that; `retry` once for each record."""
    last = [-1]

    def decide(vm: VirtualMachine, question: ExitColumns) -> str:
        index = int(question.column("index")[0])
        twice, last[0] = index == last[0], index
        return "allow" if action == "retry" and twice else action

    return decide


def test_answers_may_differ() -> None:
    vm = make()
    answers = iter(["allow", "grant", "stop"])
    rows = [SHUT, (SHUT, 4), (SHUT + 8, 4), LATER, OPEN]
    result = ask(vm, lambda vm, question: next(answers), rows)
    assert result.violations == 3 and result.stopped_at == 3
    assert exits(result, "index") == [(0,), (1,), (3,)]
    assert maps(vm, 5)[0] & 0x10 and vm.counters()["grants"] == 1
    assert result.records == 3


def test_start_and_kept_records() -> None:
    vm = make()
    result = ask(vm, always("skip"), [SHUT, SHUT], [SHUT, SHUT], start=1, max_exit_records=2)
    assert (result.violations, result.records, result.exit_records_dropped) == (3, 3, 1)
    assert exits(result, "index") == [(1,), (2,)]


# ---- the machine changes while it is asked about


def test_retry_runs_on_the_state_as_it_is() -> None:
    vm = make()

    def open_and_retry(vm: VirtualMachine, question: ExitColumns) -> str:
        if int(question.column("index")[0]):
            return "skip"
        set_map(vm, 5, FULL)
        return "retry"

    result = ask(vm, open_and_retry, [SHUT, SHUT, LATER])
    assert result.violations == 2 and result.records == 3  # SHUT once, then the protection
    assert [index for (index,) in exits(result, "index")] == [0, 2]


def test_retry_that_is_refused_again_counts_again() -> None:
    """The guest runs the instruction again, which exits again; the access is one record and one write all the same."""
    vm = make()
    answers = iter(["retry", "retry", "skip"])
    result = ask(vm, lambda vm, question: next(answers), [LATER, OPEN])
    assert (result.records, result.writes) == (2, 2)
    assert (result.violations, result.page_granular_violations) == (3, 3)
    assert result.by_object["secret"].violations == 3 and result.by_object["secret"].first_index == 0
    assert exits(result, "index") == [(0,), (0,), (0,)]
    assert vm.counters()["violations"] == 3 and vm.counters()["records"] == 2


def test_grant_of_what_was_opened_meanwhile_runs_it() -> None:
    vm = make()
    vm.dirty.track("subpage")

    def open_and_grant(vm: VirtualMachine, question: ExitColumns) -> str:
        set_map(vm, 5, FULL)
        return "grant"

    result = ask(vm, open_and_grant, [SHUT, OPEN])
    assert (result.violations, result.records, vm.counters()["grants"]) == (1, 2, 0)
    assert 5 in vm.dirty.pages(0, 16).gfns.tolist()


def test_grant_of_what_cannot_be_granted_drops_the_write() -> None:
    vm = make()
    result = ask(vm, always("grant"), [FIXED])
    assert result.records == 1 and result.violations == replay(make(), [FIXED], on_violation="grant").violations


def test_a_slot_that_goes_while_it_is_asked_about() -> None:
    vm = make()

    def delete(vm: VirtualMachine, question: ExitColumns) -> str:
        vm.delete_slot(0)
        return "retry"

    result = ask(vm, delete, [SHUT, OPEN])
    assert result.mmio == 2 and result.violations == 1


def test_objects_that_come_and_go() -> None:
    vm = make()
    steps = iter(range(10))

    def change(vm: VirtualMachine, question: ExitColumns) -> str:
        match next(steps):
            case 0:
                assert question.objects() == [["secret"]]
                vm.unprotect("secret")
                protect(vm, "other", (SHUT, 8))
            case 1:
                assert question.objects() == [["other"]]
                vm.unprotect("other")
                protect(vm, "secret", (0x6010, 16), (0x5F90, 8))
        return "skip"

    set_map(vm, 6, 0)
    result = ask(vm, change, [LATER, SHUT, LATER, 0x6010, SHUT, OPEN])
    assert result.violations == 5
    assert exits(result, "index", "gpa") == [(0, LATER), (1, SHUT), (2, LATER), (3, 0x6010), (4, SHUT)]
    assert result.exit_columns.objects() == [["secret"], ["other"], ["secret"], ["secret"], []]
    hits = {name: (hit.violations, hit.collateral, hit.first_index) for name, hit in result.by_object.items()}
    assert hits == {"secret": (3, 2, 0), "other": (1, 0, 1)}
    assert result.exit_columns[2:4].objects() == [["secret"], ["secret"]]


def test_objects_stay_counted_once_an_access_when_others_come() -> None:
    """A write over two ranges of an object is one violation of it, also when the objects change in the pause."""
    vm = make()
    set_map(vm, 6, 0)
    known = replay(make(), [(0x5F90, 256)], on_violation="grant", include="all")

    def protect_another(vm: VirtualMachine, question: ExitColumns) -> str:
        if "other" not in [item.name for item in vm.protections()]:
            protect(vm, "other", (0x8000, 8))
        return "grant"

    result = ask(vm, protect_another, [(0x5F90, 256)], include="all")
    assert result.by_object["secret"] == known.by_object["secret"]


def test_objects_of_whole_pages_keep_theirs_when_others_come() -> None:
    vm = machine()
    vm.protect("p", [ProtectedObject("whole", 0x6010, 8, "page")])

    def protect_another(vm: VirtualMachine, question: ExitColumns) -> str:
        if len(vm.protections()) == 1:
            protect(vm, "other", (0x8000, 8))
        return "skip"

    result = ask(vm, protect_another, [0x6F00, 0x8000, 0x6800])
    assert result.exit_columns.objects() == [["whole"], ["other"], ["whole"]]


def test_more_states_of_protections_than_there_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "MAX_SETS", 2)
    vm = make()
    names = iter("abc")

    def another(vm: VirtualMachine, question: ExitColumns) -> str:
        protect(vm, next(names), (0x8000, 8))
        return "skip"

    with pytest.raises(LimitExceeded, match="2 states"):
        ask(vm, another, [SHUT, SHUT, SHUT, SHUT])
    assert vm.counters()["violations"] == 2
    assert_sound(vm)


# ---- what goes wrong


def test_a_bad_record_undoes_its_stretch_only() -> None:
    vm = make()
    after: list[Any] = []

    def note(vm: VirtualMachine, question: ExitColumns) -> str:
        after.append(picture(vm))
        return "allow"

    with pytest.raises(TraceError) as caught:
        ask(vm, note, [OPEN, SHUT, OPEN], [(OPEN, 0)])
    assert caught.value.index == 3 and len(after) == 1
    assert picture(vm) == after[0]
    assert vm.counters()["records"] == 1 and vm.counters()["violations"] == 1
    assert_sound(vm)


def test_no_answer() -> None:
    vm = make()
    with pytest.raises(InvalidValue, match="one of allow, skip, grant, retry, stop"):
        ask(vm, always("perhaps"), [SHUT])
    with unchanged(vm):
        pass


# ---- one access


def access(vm: VirtualMachine, policy: Policy, **members: Any) -> tuple[AccessResult, int]:
    """Execute one access that asks; the outcome and how often it asked."""
    request = AccessRequest(**{"gpa": None, "on_violation": "ask", **members})
    run, count = InteractiveAccess(), 0
    result = vm.access(request, run)
    while run.asked is not None:
        count += 1
        run.answer(policy(vm, run.asked))
        result = vm.access(request, run)
    return result, count


def told(result: AccessResult) -> dict[str, Any]:
    """An outcome, its exits as rows."""
    shown = {name: getattr(result, name) for name in AccessResult.__dataclass_fields__ if name != "exits"}
    columns = {name: values.tolist() for name, values in result.exits.columns.items()}
    return {**shown, "exits": columns, "objects": result.exits.objects()}


BY_ADDRESS: dict[str, dict[str, Any]] = {
    "refused": {"gpa": SHUT, "data": b"12345678"},
    "protected": {"gpa": LATER, "size": 16, "data": b"0123456789abcdef"},
    "over two pages": {"gpa": 0x5FFC, "data": b"12345678"},
    "open": {"gpa": OPEN, "data": b"12345678"},
    "read": {"gpa": SHUT, "access": READ},
    "not executable": {"gpa": 0x7000, "access": EXECUTE},
    "linear, not executable": {"gva": 0x7000, "access": EXECUTE},
    "read-only slot": {"gpa": FIXED, "data": b"12345678"},
    "nothing there": {"gpa": HOLE},
    "linear, refused": {"gva": SHUT, "data": b"12345678"},
    "linear, over two pages": {"gva": 0x5FFC, "data": b"12345678"},
    "linear, open": {"gva": OPEN, "data": b"12345678"},
    "linear, read-only slot": {"gva": FIXED, "data": b"12345678"},
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("action", ["skip", "allow", "grant", "stop"])
@pytest.mark.parametrize("members", BY_ADDRESS.values(), ids=BY_ADDRESS)
def test_an_access_always_answered_the_same(profile: str, action: str, members: dict[str, Any]) -> None:
    plain, asked = make(profile), make(profile)
    known = plain.access(AccessRequest(**{"gpa": None, **members, "on_violation": action}))
    found, count = access(asked, always(action), **members)
    assert told(found) == told(known)
    assert count == (not known.allowed and known.resolution in ("violation", "internal-error", "run-failed")) or (
        action == "grant" and known.resolution == "violation"
    )
    assert asked.counters() == plain.counters()
    assert picture(asked) == picture(plain)


@pytest.mark.parametrize("where", ["gpa", "gva"])
def test_an_access_retried(where: str) -> None:
    vm = make()
    answers = iter(["retry", "open", "no more"])

    def policy(vm: VirtualMachine, question: ExitColumns) -> str:
        if next(answers) == "open":
            set_map(vm, 5, FULL)
        return "retry"

    result, count = access(vm, policy, **{where: SHUT}, data=b"12345678")
    assert (count, result.allowed, result.lands, result.resolution, result.run) == (2, True, True, "completed", None)
    assert vm.read_memory(SHUT, 8) == b"12345678"
    seen = [name for name in result.exits.resolution_names() if name == "violation"]
    assert len(seen) == 2
    counted = vm.counters()
    assert (counted["violations"], counted["records"], counted["writes"]) == (2, 1, 1)


@pytest.mark.parametrize("where", ["gpa", "gva"])
@pytest.mark.parametrize("action", ["grant", "allow"])
def test_an_access_whose_sub_page_was_opened_meanwhile(where: str, action: str) -> None:
    vm = make()

    def policy(vm: VirtualMachine, question: ExitColumns) -> str:
        set_map(vm, 5, FULL)
        return action

    result, count = access(vm, policy, **{where: SHUT}, data=b"12345678")
    assert (count, result.lands) == (1, True)
    assert vm.read_memory(SHUT, 8) == b"12345678"
    counted = vm.counters()
    assert (counted["violations"], counted["records"], counted["writes"], counted["grants"]) == (1, 1, 1, 0)


def test_an_access_takes_no_other_answer() -> None:
    vm = make()
    run = InteractiveAccess()
    vm.access(AccessRequest(gpa=SHUT, on_violation="ask"), run)
    with pytest.raises(InvalidValue):
        run.answer("perhaps")
