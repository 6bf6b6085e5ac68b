"""The parts of a run. Each gives plain values: what is printed and written as JSON."""

from __future__ import annotations

import json
import statistics
import tempfile
from typing import Any

from bench import console as console_pages
from bench import exits as exit_traces
from bench import network as network_parts
from bench.asking import AllowedReplay, AskedReplay
from bench.c_walk import CSum, CWalk
from bench.client import CALLS, ClientBitmaps, ClientReplay, RawBitmaps, RawReplay
from bench.data import POLICIES, TRACES, Answer, expected, load_policy, load_trace
from bench.footprints import Building, Costing
from bench.guest_virtual import GuestVirtualReplay
from bench.http_replay import CONTENT_TYPES, HttpReplay
from bench.kvmi import READS, KvmiReplay, Reads, Tool, attach, image, loaded, place
from bench.large_guest import measure
from bench.memory import bytes_of_pages
from bench.numpy_check import NumpyCheck
from bench.readers import FORMATS, Reading
from bench.replay import ColumnReplay, EngineReplay
from bench.servers import empty_app, service, service_and_constants
from bench.single_calls import SingleCalls
from bench.timing import Method, Timing, alternate, median_ratio, one_core
from bench.unicorn_hook import WRITES, UnicornHook
from engine.footprint.places import LEVELS

Row = dict[str, Any]

PLAIN, ASKED = "skip (i)", "asked (i)"
ALLOWED, ASKED_BY_KVMI = "allow (i)", "KVMI (i)"
READ_BY_KVMI, CONSTANTS = "KVMI read (m)", "constants (m)"
BY_GVA = "by gva (j)"
A, B, C, D, E = "numpy bitmap (a)", "C walk (b)", "Unicorn hook (c)", "C sum (d)", "engine (e)"
E_COLUMNS = "engine, columns (e)"


class WrongAnswer(Exception):
    """A method did not arrive at the ground truth, so its speed means nothing."""


def _verify(name: str, trace: str, policy: str, answer: Answer) -> None:
    truth = expected(policy, trace)
    if truth.differs(answer):
        raise WrongAnswer(f"{name} on {trace}, {policy}: {answer} instead of {truth}")


def _row(trace: str, policy: str, method: str, count: int, timing: Timing, **more: Any) -> Row:
    return {
        "trace": trace,
        "policy": policy,
        "method": method,
        "per_second": timing.rate(count),
        "seconds": list(timing.seconds),
        **more,
    }


def checks(rounds: int) -> list[Row]:
    """(a), (b), (d) and (e) in turn, on one core, over each trace and policy."""
    rows = []
    for trace in map(load_trace, TRACES):
        for policy in map(load_policy, POLICIES):
            numpy_check, c_walk, c_sum = NumpyCheck(trace, policy), CWalk(trace, policy), CSum(trace)
            engine, columns = EngineReplay(trace, policy), ColumnReplay(trace, policy)
            methods: dict[str, Method] = {A: numpy_check, B: c_walk, D: c_sum, E: engine, E_COLUMNS: columns}
            with one_core():
                timings = alternate(methods, rounds)
            for name, method in ((A, numpy_check), (B, c_walk), (E, engine), (E_COLUMNS, columns)):
                _verify(name, trace.name, policy.name, method.answer())
            if not c_sum.check():
                raise WrongAnswer(f"{D} on {trace.name}")
            c_walk.close()
            rows += [
                _row(
                    trace.name,
                    policy.name,
                    name,
                    len(trace),
                    timing,
                    of_c_walk=median_ratio(timing, timings[B]),
                    of_numpy=median_ratio(timing, timings[A]),
                    of_sum=median_ratio(timing, timings[D]),
                )
                for name, timing in timings.items()
            ]
    return rows


def exits(rounds: int) -> list[Row]:
    """(n) Refused writes, to the result and to the store, and first touches, beside the C walk of the same records."""
    rows = []
    for trace, policy in (exit_traces.refused(), exit_traces.touched()):
        c_walk, engine = CWalk(trace, policy), ColumnReplay(trace, policy)
        names = walk, ours, durable = [f"{trace.name}, {name}" for name in ("C walk", "engine", "HTTP and SQLite")]
        with one_core():
            timings = alternate({walk: c_walk, ours: engine}, rounds)
        answer, totals = engine.answer(), c_walk.totals
        if (answer.violations, answer.page_granular) != (totals.violations, totals.page_granular):
            raise WrongAnswer(ours)
        c_walk.close()
        if answer.violations:
            with exit_traces.durable(trace, policy) as replay:
                timings |= alternate({durable: replay}, rounds)
                if replay.answer().violations != answer.violations:
                    raise WrongAnswer(durable)
        for name in names[: len(timings)]:
            ratio = median_ratio(timings[name], timings[walk])
            rows.append(_row(trace.name, policy.name, name, len(trace), timings[name], of_c_walk=ratio))
        if answer.violations and engine.result is not None:
            rows[-1]["bytes_kept"] = exit_traces.stored_bytes(engine.result.exit_columns) / answer.violations
    return rows


def guest_virtual(rounds: int) -> list[Row]:
    """(j) beside (e): the same trace by linear addresses and by GPA, on one core."""
    rows = []
    policy = load_policy(POLICIES[0])
    for trace in map(load_trace, TRACES):
        methods = {E: EngineReplay(trace, policy), BY_GVA: GuestVirtualReplay(trace, policy)}
        with one_core():
            timings = alternate(methods, rounds)
        for name, method in methods.items():
            _verify(name, trace.name, policy.name, method.answer())
            ratio = median_ratio(timings[name], timings[E])
            rows.append(_row(trace.name, policy.name, name, len(trace), timings[name], of_gpa=ratio))
    return rows


def unicorn(rounds: int) -> list[Row]:
    """(c), which has its own small store loop: the recorded stores cannot be run again."""
    policy = load_policy(POLICIES[0])
    try:
        hook = UnicornHook(policy)
    except ImportError:
        return []
    with one_core():
        timing = alternate({C: hook}, rounds)[C]
    if not hook.check():
        raise WrongAnswer(C)
    return [_row("store loop", policy.name, C, WRITES, timing)]


def http_replay(rounds: int) -> list[Row]:
    """(f) Each body format in turn, against one service process; client and server may use a core each."""
    rows = []
    with service() as port:
        for trace in map(load_trace, TRACES):
            for policy in map(load_policy, POLICIES):
                methods = {
                    f"HTTP {kind}, {trace.name} (f)": HttpReplay(port, kind, trace, policy) for kind in CONTENT_TYPES
                }
                timings = alternate(methods, rounds)
                for name, method in methods.items():
                    _verify(name, trace.name, policy.name, method.answer())
                    method.close()
                    sent = {"bytes_record": method.bytes_record}
                    rows.append(_row(trace.name, policy.name, name, len(trace), timings[name], **sent))
    return rows


def network(rounds: int) -> list[Row]:
    """(o) What each part of the way takes alone, for each kind of body."""
    trace, policy = load_trace(TRACES[0]), load_policy(POLICIES[0])
    rows = []
    with network_parts.parts(trace, policy) as kinds:
        for kind, methods in kinds.items():
            timings = alternate(methods, rounds)
            for name, method in methods.items():
                if isinstance(method, HttpReplay):
                    _verify(name, trace.name, policy.name, method.answer())
                    method.close()
                row = _row(trace.name, policy.name, f"{kind}: {name} (o)", len(trace), timings[name])
                rows.append({**row, "milliseconds": 1000 * timings[name].median})
    return rows


def asking(rounds: int) -> list[Row]:
    """(i) The same trace with ``skip`` and with ``ask``, a tool answering ``skip`` each time; and ``allow`` so."""
    trace, policy = load_trace(TRACES[0]), load_policy(POLICIES[0])
    with place() as directory, service(SUBPAGE_KVMI_SOCKETS=f'["unix:{directory}"]') as port:
        methods = {
            PLAIN: HttpReplay(port, "packed", trace, policy),
            ASKED: AskedReplay(port, "packed", trace, policy),
            ALLOWED: AllowedReplay(port, "packed", trace, policy),
            ASKED_BY_KVMI: KvmiReplay(port, "packed", trace, policy, directory),
        }
        timings = alternate(methods, rounds)
        for name, method in methods.items():
            _verify(name, trace.name, policy.name, method.answer())
            method.close()
    rows = []
    for name, beside in ((PLAIN, PLAIN), (ASKED, PLAIN), (ALLOWED, ALLOWED), (ASKED_BY_KVMI, ALLOWED)):
        row = _row(trace.name, policy.name, name, len(trace), timings[name])
        row["of_plain"] = median_ratio(timings[name], timings[beside])
        method = methods[name]
        if isinstance(method, AskedReplay | KvmiReplay):
            pairs = zip(timings[beside].seconds, timings[name].seconds, strict=True)
            extra = sorted(late - early for early, late in pairs)
            row["microseconds"] = extra[len(extra) // 2] / method.questions * 1e6
        rows.append(row)
    return rows


def kvmi_reads(rounds: int) -> list[Row]:
    """(m) Pages of a guest by KVMI, and constants of the same size from the same loop."""
    raw = image()
    with place() as directory:
        constants = Tool(directory / "constants")
        with service_and_constants(str(constants.path), SUBPAGE_KVMI_SOCKETS=f'["unix:{directory}"]') as port:
            constants.accept(greet=False)
            tool = Tool(directory / "tool")
            attach(port, loaded(port, raw), tool)
            reads = Reads(tool, raw)
            if not reads.check():
                raise WrongAnswer(READ_BY_KVMI)
            timings = alternate({READ_BY_KVMI: reads, CONSTANTS: Reads(constants, raw)}, rounds)
            tool.close()
        constants.close()
    return [
        {
            "method": name,
            "per_second": timing.rate(READS),
            "of_constant": median_ratio(timing, timings[CONSTANTS]),
            "seconds": list(timing.seconds),
        }
        for name, timing in timings.items()
    ]


def client(rounds: int) -> list[Row]:
    """(k) Bitmaps and the boot, by the client and by httpx2, in turn."""
    trace, policy = load_trace(TRACES[0]), load_policy(POLICIES[0])
    truth, rows = expected(policy.name, trace.name), []
    with service() as port:
        url = f"http://127.0.0.1:{port}"
        for what, count, raw, wrapped in (
            ("bitmap", CALLS, RawBitmaps(url, policy), ClientBitmaps(url, policy)),
            ("boot", len(trace), RawReplay(url, policy), ClientReplay(url, policy)),
        ):
            timings = alternate({f"{what}, httpx2 (k)": raw, f"{what}, client (k)": wrapped}, rounds)
            first, _ = timings.values()
            for method in (raw, wrapped):
                if isinstance(method, RawReplay) and method.violations != truth.violations:
                    raise WrongAnswer(what)
                method.close()
            rows += [
                _row(trace.name, policy.name, name, count, timing, of_raw=median_ratio(timing, first))
                for name, timing in timings.items()
            ]
    return rows


def single_calls(rounds: int) -> list[Row]:
    """(g) GET and SET of one page's map, in memory and in SQLite, and GET of an empty endpoint, in turn."""
    set_one = json.dumps({"access": ["0xfffffff0"]})
    with (
        tempfile.TemporaryDirectory() as folder,
        service() as port,
        service(f"sqlite:///{folder}/bench.db") as kept,
        empty_app() as empty_port,
    ):
        window = _window(port)
        methods = {
            "empty endpoint (g)": SingleCalls(empty_port, "/"),
            "GET subpages (g)": SingleCalls(port, window),
            "SET subpages, memory (g)": SingleCalls(port, window, "PUT", set_one),
            "SET subpages, SQLite (g)": SingleCalls(kept, _window(kept), "PUT", set_one),
        }
        alternate(methods, rounds)
    empty = next(iter(methods.values())).rates[1:]
    return [
        {
            "method": name,
            "per_second": statistics.median(method.rates[1:]),
            "rates": method.rates[1:],
            "of_empty": statistics.median(rate / beside for rate, beside in zip(method.rates[1:], empty, strict=True)),
        }
        for name, method in methods.items()
    ]


def _window(port: int) -> str:
    """The path of one page's map, on a machine of its own."""
    vm = HttpReplay(port, "packed", load_trace(TRACES[0], 0), load_policy(POLICIES[0]))
    vm.prepare()
    return f"{vm.path}/subpages?gfn=0x2000&npages=1"


def console(rounds: int) -> list[Row]:
    """(m) What a person waits for."""
    with service(SUBPAGE_MAX_VMS=str(console_pages.MACHINES)) as port:
        return console_pages.measure(port, rounds)


def large_guest(_rounds: int) -> list[Row]:
    """(h) Memory; nothing is timed."""
    return [
        {"method": "1 TiB guest (h)", **measure()},
        {"method": "1 M protected pages (h)", "bytes_each": bytes_of_pages(1_000_000)},
    ]


def readers(rounds: int) -> list[Row]:
    """Each format of tools that has a writer, and Arrow's CSV reader alone beside ours."""
    methods = {name: Reading(name) for name in FORMATS}
    with one_core():
        timings = alternate(methods, rounds)
    return [
        {
            "method": name,
            "per_second": timing.rate(methods[name].items),
            "records": methods[name].records,
            "seconds": list(timing.seconds),
        }
        for name, timing in timings.items()
    ]


def footprints(rounds: int) -> list[Row]:
    """Traces reduced to their places, at each level; and 10,000 policies, then one more, on what came of them."""
    rows = []
    for trace in map(load_trace, TRACES):
        building = {level: Building(trace, level) for level in LEVELS}
        with one_core():
            timings = alternate({f"built, {level}": method for level, method in building.items()}, rounds)
        for level, method in building.items():
            timing = timings[f"built, {level}"]
            rows.append(
                {
                    "trace": trace.name,
                    "method": f"built, {level}",
                    "per_second": timing.rate(len(trace)),
                    "places": len(method.footprint),
                    "table_bytes": method.table_bytes,
                    "seconds": list(timing.seconds),
                }
            )
            many = Costing(method.footprint, 10_000)
            asking = {"10,000 policies": many, "one more policy": Costing(method.footprint, 100, alone=True)}
            for policy in map(load_policy, POLICIES):
                if expected(policy.name, trace.name).violations != many.violations(policy):
                    raise WrongAnswer(f"costs on {trace.name}, {policy.name}")
            with one_core():
                costs = alternate(asking, rounds)
            rows += [
                {
                    "trace": trace.name,
                    "method": f"{name}, {level}",
                    "per_second": taken.rate(asking[name].count),
                    "milliseconds": taken.median * 1e3 / len(asking[name].calls),
                    "seconds": list(taken.seconds),
                }
                for name, taken in costs.items()
            ]
    return rows
