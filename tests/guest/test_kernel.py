"""Debian's kernel in the QEMU that is installed: what is recorded of its script is what the script did, and watching it
live comes to the same as replaying the recording.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from capture import guest as guests
from capture import layout
from capture.errors import CaptureError
from capture.guest import SmallGuest, small_guest
from capture.qemu import program_of
from capture.recording import Recording, Wanted
from engine.symbols.table import SymbolTable
from service.cli.app import app
from service.cli.guest_demo import policy_of
from service.cli.recorded_files import RecordedFile
from service.cli.symbol_policies import read_symbols
from service.settings import MIB, Settings
from tests.support.bodies import PARQUET, Body
from tests.support.http import new_vm
from tests.support.http import replayed as replayed_on
from tests.support.qemu import QEMU
from tests.support.server import running

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(
        shutil.which(QEMU) is None or shutil.which("cc") is None,
        reason="needs qemu-system-x86_64 and a C compiler",
    ),
]

ROOT = Path(__file__).parents[2]
IMAGE, DIRECT = 0xFFFFFFFF80000000, 0xFFFF888000000000
DIRECT_END = DIRECT + (64 << 40)
# How a guest turns itself off.
LAST = "__x64_sys_reboot"
# The same guest each time: time is what it executes, and begins on a day of ours.
SAME = ("-icount", "shift=0,sleep=off", "-rtc", "base=2026-01-01T00:00:00,clock=vm", "-seed", "1")
WRITTEN = {"modprobe_path": b"/bin/true\0", "core_pattern": b"|/bin/false\0"}

runner = CliRunner()


@dataclass
class Recorded:
    """A recording, its file, and what was in the guest's memory when it had switched itself off."""

    records: NDArray[np.void]
    file: Path
    memory: dict[str, bytes]


@pytest.fixture(scope="module")
def guest() -> SmallGuest:
    """Made once for a working tree: fetching it and asking it for its symbols takes longer than the tests."""
    folder = ROOT / "build" / "guest"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            made = small_guest(folder, QEMU)
        except CaptureError as error:  # without a mirror of Debian's there is no kernel to boot
            pytest.skip(f"no guest: {error}")
    return made


@pytest.fixture(scope="module")
def symbols(guest: SmallGuest) -> SymbolTable:
    return read_symbols(guest.symbols).table


def address(symbols: SymbolTable, name: str) -> int:
    return symbols.find(name)[0].address


@pytest.fixture(scope="module")
def recorded(guest: SmallGuest, symbols: SymbolTable, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(guest, symbols, tmp_path_factory.mktemp("recorded") / "guest.parquet")


def record(guest: SmallGuest, symbols: SymbolTable, file: Path, *more: str, same: Sequence[str] = SAME) -> Recorded:
    """The guest from its mark to its end. With -no-shutdown its memory is there still."""
    wanted = Wanted(start_pc=address(symbols, guests.START))
    with Recording(guest.command("-no-shutdown", *same, *more), wanted) as recording:
        out = RecordedFile(file, file.suffix, recording.identity())
        parts = []
        for records in recording:
            out.add(records)
            parts.append(records.copy())
        out.close()
        records = np.concatenate(parts)
        read = recording.qemu.read_memory
        memory = {name: read(address(symbols, name) - IMAGE, len(text)) for name, text in WRITTEN.items()}
        split = records[records["pc"] == guests.CROSSING_PC]
        memory["crossing"] = b"".join(read(int(part["gpa"]), int(part["size"])) for part in split)
        assert recording.word == "the guest shut down"
        return Recorded(records, file, memory)


def test_the_guest_s_memory_is_what_its_script_wrote_and_each_byte_is_a_record(
    recorded: Recorded, symbols: SymbolTable
) -> None:
    for name, text in WRITTEN.items():
        assert recorded.memory[name] == text
        first = address(symbols, name)
        within = recorded.records[(recorded.records["gva"] >= first) & (recorded.records["gva"] < first + 256)]
        assert within["gva"].tolist() == [first + n for n in range(len(text))]
        assert set(within["size"].tolist()) == {1}
        writers = {symbols.label(int(pc)) for pc in within["pc"]}
        assert {writer.partition("+")[0] for writer in writers if writer} == {"proc_dostring"}


def test_each_address_of_the_kernel_leads_where_the_kernel_says(recorded: Recorded, symbols: SymbolTable) -> None:
    """nokaslr: the image lies at its linear address less 0xffffffff80000000, the direct map at its less its base."""
    gva, gpa = recorded.records["gva"], recorded.records["gpa"]
    of_image = (gva >= address(symbols, "_text")) & (gva < address(symbols, "_end"))
    direct = (gva >= DIRECT) & (gva < DIRECT_END)
    assert np.count_nonzero(of_image) > 1000 and np.count_nonzero(direct) > 100_000
    assert np.array_equal(gpa[of_image], gva[of_image] - np.uint64(IMAGE))
    assert np.array_equal(gpa[direct], gva[direct] - np.uint64(DIRECT))
    assert np.array_equal(gpa & np.uint64(4095), gva & np.uint64(4095))


def test_a_store_over_two_pages_is_whole(recorded: Recorded) -> None:
    split = recorded.records[recorded.records["pc"] == guests.CROSSING_PC]
    assert split[["gva", "size"]].tolist() == [(guests.CROSSING_GVA, 4), (guests.CROSSING_GVA + 4, 4)]
    assert recorded.memory["crossing"] == guests.CROSSING.to_bytes(8, "little")
    parts = recorded.records[recorded.records["flags"] & layout.SPLIT != 0]
    first, second = parts[::2], parts[1::2]
    assert np.array_equal(first["gva"] + first["size"], second["gva"])
    assert np.array_equal(first["pc"], second["pc"]) and not np.any(second["gva"] & np.uint64(4095))
    sizes = set((first["size"] + second["size"]).tolist())
    assert sizes <= {2, 4, 8, 16}


def test_loads_are_no_records(recorded: Recorded, symbols: SymbolTable) -> None:
    """Interface 1 tells of loads, too. What the kernel may only read is read all the time, and never written to."""
    assert not np.any(recorded.records["pc"] == guests.CROSSING_LOAD_PC)
    gva = recorded.records["gva"]
    first, end = address(symbols, "__start_rodata"), address(symbols, "__end_rodata")
    assert not np.any((gva >= first) & (gva < end))


def test_watched_live_and_recorded_come_to_the_same(guest: SmallGuest, symbols: SymbolTable, tmp_path: Path) -> None:
    """Until the guest turns itself off: what is stored after that hangs on when QEMU stops it. RAM is a file that QEMU
    shares: the machine has the guest's memory, and its page tables lead where the kernel says."""
    policy = policy_of(guest, tmp_path / "policy.json")
    ram, whole = tmp_path / "ram", tmp_path / "whole.parquet"
    shared = ["-object", f"memory-backend-file,id=ram,size=512M,mem-path={ram},share=on"]
    span = ["--symbols", guest.symbols, "--start", guests.START, "--until", LAST]
    command = guest.command(*SAME, *shared, "-machine", "memory-backend=ram")
    made = runner.invoke(app, ["record", "-o", *map(str, [whole, *span, "--", *command])])
    assert made.exit_code == 0, made.output
    ram.unlink()
    with running(Settings(warm_up=False, memory_files=(ram,))) as server:
        options = ["--server", server.url, "--json", "--policy", policy, *span, "--", *command]
        live = runner.invoke(app, ["live", *map(str, options)])
        assert live.exit_code == 0, live.output
        watched = json.loads(live.stdout)
        assert f"the machine's memory is the guest's as it is now: {ram}" in live.stderr
        cr3 = address(symbols, "init_top_pgt") - IMAGE
        for name, text in WRITTEN.items():
            here = f"/v1/vms/{watched['vm']}"
            walk = server.client.get(f"{here}/walk?gva={address(symbols, name):#x}&cr3={cr3:#x}").json()
            assert walk["gpa"] == hex(address(symbols, name) - IMAGE)
            assert server.client.get(f"{here}/memory?gpa={walk['gpa']}&size={len(text)}").content == text
        vm = new_vm(server.client, memory_slots=[{"slot": 0, "gpa": 0, "size": 512 * MIB}])
        server.client.post(f"{vm}/protections", json=json.loads(policy.read_text())).raise_for_status()
        replayed = replayed_on(server.client, vm, Body(whole.read_bytes(), PARQUET), "on_violation=allow")
        assert totals(watched) == totals(replayed)
        assert watched["records"] == pq.read_metadata(whole).num_rows
        assert watched["by_object"]["modprobe_path"]["violations"] == len(WRITTEN["modprobe_path"])
        assert watched["by_object"]["core_pattern"]["violations"] == len(WRITTEN["core_pattern"])
        exits = [exits_of(server.client, trace) for trace in (watched, replayed)]
        assert exits[0] == exits[1] and len(exits[0]) == watched["violations"]


@pytest.mark.soak
def test_a_guest_shows_its_symbols_itself(guest: SmallGuest, tmp_path: Path) -> None:
    """The policy names symbols, which are known, like the mark, once the guest runs."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"objects": [{"symbol": name} for name in WRITTEN]}))
    with running(Settings(warm_up=False)) as server:
        options = ["--server", server.url, "--json", "--policy", str(policy), "--kallsyms-from-guest"]
        command = guest.command(append="subpage=live")
        live = runner.invoke(app, ["live", *options, "--start", guests.START, "--", *command])
        assert live.exit_code == 0, live.output
        by_object = json.loads(live.stdout)["by_object"]
    assert {name: hits["violations"] - hits["collateral"] for name, hits in by_object.items()} == {
        name: len(text) for name, text in WRITTEN.items()
    }


@pytest.mark.soak
@pytest.mark.parametrize("vcpus", ["1", "2"])
def test_two_recordings_are_one_file(guest: SmallGuest, tmp_path: Path, vcpus: str) -> None:
    """Up to where the script switches the guest off: what follows hangs on when QEMU stops it. Two vCPUs take turns by
    what they have executed."""
    if vcpus == "2" and int(program_of([QEMU]).version.partition(".")[0]) < 9:
        pytest.skip("QEMU 7.2 under -icount does not get a kernel beyond the start of its second vCPU")
    options = ["--start", guests.START, "--until", LAST, "--symbols", str(guest.symbols)]
    command = guest.command(*SAME, "-smp", vcpus)
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for file in files:
        assert runner.invoke(app, ["record", "-o", str(file), *options, "--", *command]).exit_code == 0
    assert digest(files[0]) == digest(files[1])
    assert len(set(pq.read_table(files[0])["vcpu"].to_pylist())) == int(vcpus)


@pytest.mark.soak
def test_two_vcpus_that_run_at_once_have_one_order(guest: SmallGuest, symbols: SymbolTable, tmp_path: Path) -> None:
    """In threads of their own; what each of them stored is all there, as memory has it."""
    found = record(guest, symbols, tmp_path / "two.parquet", "-smp", "2", same=())
    assert set(found.records["vcpu"].tolist()) == {0, 1}
    test_the_guest_s_memory_is_what_its_script_wrote_and_each_byte_is_a_record(found, symbols)
    test_each_address_of_the_kernel_leads_where_the_kernel_says(found, symbols)
    test_a_store_over_two_pages_is_whole(found)
    test_loads_are_no_records(found, symbols)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def totals(trace: dict[str, Any]) -> dict[str, Any]:
    names = ("records", "writes", "violations", "page_granular_violations", "by_object", "mmio", "exits")
    return {name: trace[name] for name in names}


def exits_of(client: Any, trace: dict[str, Any]) -> list[dict[str, Any]]:
    lines = client.get(
        f"/v1/vms/{trace['vm']}/traces/{trace['id']}/exits", headers={"Accept": "application/x-ndjson"}
    ).text.splitlines()
    found = [json.loads(line) for line in lines]
    # The one machine has the guest's symbols, the other one has not.
    return [{name: value for name, value in row.items() if name not in ("symbol", "writer")} for row in found]
