"""How cost grows with what there is more of: each curve is a list of points, a size and what it costs.

``python -m bench.curves`` measures all of them, writes them as JSON and draws them (``bench.plots``).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.data import CHUNK, POLICIES, load_policy, load_trace
from bench.environment import environment
from bench.footprints import Building, Costing
from bench.memory import bytes_of_pages
from bench.plots import draw
from bench.replay import machine
from bench.timing import one_core
from engine.kvm.slots import SlotSpec
from engine.machine import VirtualMachine
from engine.machine.subpage_operations import SubpageRange
from engine.state.config import VcpuConfig, VmConfig
from engine.trace.columns import TraceChunk
from engine.trace.session import ReplayOptions

PAGE = 4096
RESULTS = Path("docs/images/scale-curves.json")
PICTURES = Path("docs/images")

Point = dict[str, float]


class Curve(NamedTuple):
    """What grows along x, what is measured along y, the sizes, and the measurement of one of them."""

    x: str
    y: str
    sizes: tuple[int, ...]
    measure: Callable[[int], float]


def _median(run: Callable[[], Callable[[], object]], rounds: int = 5) -> float:
    """Seconds of what ``run`` prepares, the median after one round to warm up."""
    taken = []
    for _ in range(rounds + 1):
        timed = run()
        gc.collect()
        start = time.perf_counter()
        timed()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _chunks(records: np.ndarray) -> list[TraceChunk]:
    return [TraceChunk(np.array(records[at : at + CHUNK]), None, {}) for at in range(0, len(records), CHUNK)]


def _replay(vm: VirtualMachine, chunks: list[TraceChunk], times: int = 1, most: int | None = None) -> Any:
    options = ReplayOptions() if most is None else ReplayOptions(max_exit_records=most)
    with vm.replay(options) as replay:
        for _ in range(times):
            for chunk in chunks:
                replay.feed(chunk)
        return replay.finish()


def records(size: int) -> float:
    """Seconds to replay so many records: the boot over and over."""
    trace, policy = load_trace("boot"), load_policy(POLICIES[0])
    chunks = _chunks(trace.records[: min(size, len(trace))])

    def fresh() -> Callable[[], object]:
        return partial(_replay, machine(policy), chunks, -(-size // len(trace)))

    return _median(fresh, 3)


def protected_pages(size: int) -> float:
    """Seconds to replay a million stores that are spread over so many protected pages, each seen before."""
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, size * PAGE)], spp=True)
    vm.set_subpages([SubpageRange(0, size, 0x7FFF_FFFF)])
    draw_from = np.random.default_rng(size)
    stores = np.empty((1_000_000, 2), dtype=np.uint64)
    stores[:, 0] = draw_from.integers(0, size, len(stores), dtype=np.uint64) * np.uint64(PAGE)
    stores[:, 1] = np.uint64(8 | 1 << 16)
    chunks = _chunks(stores)
    return _median(lambda: lambda: _replay(vm, chunks), 3)


def machines(size: int) -> float:
    """Milliseconds to make one more machine with sixteen protected pages where there are so many."""
    made = [_small() for _ in range(size)]
    taken = _median(lambda: _small)
    assert len(made) == size
    return taken * 1e3


def _small() -> VirtualMachine:
    vm = VirtualMachine.create(VmConfig(), [SlotSpec(0, 0, 1 << 30)], spp=True)
    vm.set_subpages([SubpageRange(0, 16, 0xFFFF)])
    return vm


def exit_records(size: int) -> float:
    """Seconds to replay so many stores that are all refused, each exit record kept."""
    policy = load_policy(POLICIES[0])
    stores = np.empty((min(size, 1 << 20), 2), dtype=np.uint64)
    stores[:, 0] = policy.objects[0]["gpa"]
    stores[:, 1] = np.uint64(8 | 1 << 16)
    chunks = _chunks(stores)
    vm = machine(policy)
    return _median(lambda: lambda: _replay(vm, chunks, size // len(stores), size), 3)


def policies(size: int) -> float:
    """Seconds to cost so many policies over the footprint of the boot."""
    building = Building(load_trace("boot"), "spans")
    building.run()
    costing = Costing(building.footprint, size)
    return _median(lambda: costing.run, 3)


def vcpus(size: int) -> float:
    """Seconds to replay a million stores by so many vCPUs in turn."""
    config = VmConfig(vcpus=tuple(VcpuConfig(number) for number in range(size)))
    vm = VirtualMachine.create(config, [SlotSpec(0, 0, 1 << 30)], spp=True)
    vm.set_subpages([SubpageRange(0, 16, 0xFFFF)])
    boot = load_trace("boot").records[:1_000_000].copy()
    boot[:, 1] |= (np.arange(len(boot), dtype=np.uint64) % np.uint64(size)) << np.uint64(32)
    chunks = _chunks(boot)
    return _median(lambda: lambda: _replay(vm, chunks), 3)


CURVES: dict[str, Curve] = {
    "records": Curve("records", "seconds", (10**5, 10**6, 10**7, 10**8), records),
    "protected-pages": Curve(
        "protected pages", "seconds, a million stores", (10**3, 10**4, 10**5, 10**6), protected_pages
    ),
    "page-bytes": Curve("protected pages", "bytes each beyond the tables", (10**5, 10**6), bytes_of_pages),
    "machines": Curve("machines", "milliseconds for one more", (1, 10, 100, 1000), machines),
    "exit-records": Curve("exit records", "seconds", (10**4, 10**5, 10**6, 10**7), exit_records),
    "policies": Curve("policies", "seconds", (1, 10, 100, 1000, 10_000), policies),
    "vcpus": Curve("vCPUs", "seconds, a million stores", (1, 4, 16, 64, 256, 1024), vcpus),
}


def measured(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each curve by its name: its axes and its points."""
    for name in names:
        curve = CURVES[name]
        with one_core():
            points = [[size, curve.measure(size)] for size in curve.sizes]
        yield name, {"x": curve.x, "y": curve.y, "points": points}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES), help="curves to measure")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help=f"where the figures go ({RESULTS})")
    parser.add_argument(
        "--pictures", type=Path, default=PICTURES, metavar="DIR", help=f"where they are drawn ({PICTURES})"
    )
    options = parser.parse_args()
    kept = json.loads(options.json.read_text())["curves"] if options.json.exists() else {}
    for name, curve in measured(options.only):
        kept[name] = curve
        print(name, *(f"{size:,.0f}: {value:.4g}" for size, value in curve["points"]), sep="  ")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"environment": environment(), "curves": kept}, indent=1) + "\n")
    for path in draw(kept, options.pictures):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
