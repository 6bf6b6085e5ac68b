"""What the recorder makes of the accesses that QEMU tells it, up to the reader: against a stand-in for QEMU."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture import layout
from capture.errors import CaptureError
from capture.qemu import MOST_RAM_OF_INTERFACE_1, program_of
from capture.recording import Recording, Wanted
from capture.ring import Ring
from tests.capture.conftest import DEVICE, STORE, SWAPPED, UNKNOWN, Fake
from tests.support.waiting import until

KERNEL = 0xFFFFFFFF81000000
PC = 0xFFFFFFFF81234567


def recorded(command: list[str], wanted: Wanted | None = None, capacity: int = 1 << 12) -> tuple[Any, Recording]:
    """All records of a guest, copied, and the recording at its end."""
    parts = []
    with Recording(command, wanted or Wanted(), capacity) as recording:
        parts = [records.copy() for records in recording]
    return np.concatenate(parts), recording


def test_the_two_descriptions_of_the_ring_are_one(libraries: dict[int, Path]) -> None:
    words = (ctypes.c_uint64 * 14).in_dll(ctypes.CDLL(str(libraries[2])), "fake_offsets")
    fields = {**(layout.HEADER.fields or {})}
    names = (
        "capacity",
        "high_gpa",
        "head",
        "interface",
        "loads",
        "tail",
        "closed",
        "guard_bytes",
        "judged",
        "sample",
        "guarding",
    )
    assert list(words) == [
        layout.MAGIC,
        *(fields[name][1] for name in names),
        *((layout.RECORD.fields or {})[name][1] for name in ("size", "lap")),
    ]
    assert (layout.HEADER.itemsize, layout.RECORD.itemsize) == (256, 32)


@pytest.mark.parametrize("interface", [1, 2, 4])
def test_a_store_is_a_record_with_both_addresses(fake: Fake, interface: int) -> None:
    command = fake(accesses=[[0, STORE | 3, KERNEL + 0x10, PC], [0, STORE, 0x7000, 0x400000]], interface=interface)
    found, recording = recorded(command)
    assert found[["gpa", "gva", "pc", "size", "vcpu", "flags"]].tolist() == [
        (0x1001010, KERNEL + 0x10, PC, 8, 0, layout.KERNEL),
        (0x6000, 0x7000, 0x400000, 1, 0, 0),
    ]
    assert recording.guest.interface == interface
    assert recording.guest.ranges == ((0, 1 << 30),)
    assert recording.word == "QEMU ended" and not recording.failed


def test_a_store_over_two_pages_is_two_records_each_where_its_page_is(fake: Fake) -> None:
    """QEMU calls once, with the address of the first byte."""
    found, recording = recorded(fake(accesses=[[0, STORE | 3, 0x7FFD, PC]]))
    assert found[["gpa", "gva", "size", "flags"]].tolist() == [
        (0x6FFD, 0x7FFD, 3, layout.KERNEL | layout.SPLIT),
        (0x9000, 0x8000, 5, layout.KERNEL | layout.SPLIT),
    ]
    assert recording.counts.split == 1


def test_what_is_stored_and_under_which_cr3_is_in_wide_records(fake: Fake) -> None:
    """In the order of memory, whatever that of the instruction; each part of a store over two pages has its own."""
    stores = [[0, STORE | 2, 0x7000, PC], [0, STORE | SWAPPED | 1, 0x7010, PC], [0, STORE | 4, 0x7FFC, PC]]
    found, recording = recorded(fake(accesses=stores, interface=4), Wanted(wide=True))
    assert found["cr3"].tolist() == [0x1234000] * 4
    assert [bytes(value[:size]).hex() for value, size in zip(found["value"], found["size"], strict=True)] == [
        "88776655",
        "7788",
        "88776655",
        "4433221100ffeeddccbbaa99",
    ]
    assert recording.guest.interface == 4


@pytest.mark.parametrize("interface", [1, 2])
def test_values_are_refused_where_they_are_not_told(
    fake: Fake, interface: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match="QEMU ended with status 1 before the guest ran; it said why"):
        recorded(fake(accesses=[], interface=interface), Wanted(wide=True))
    assert "tells plugins neither CR3 nor what is stored" in capfd.readouterr().err


def test_recording_ends_where_it_is_told(fake: Fake) -> None:
    """What the instruction itself stores is not in it."""
    stores = [[0, STORE | 3, 0x7000 + 8 * n, pc] for n, pc in enumerate((PC, PC + 4, PC, PC + 8, PC))]
    found, recording = recorded(fake(accesses=stores, sleep=60), Wanted(stop_pc=PC, stop_n=2))
    assert found["gva"].tolist() == [0x7000, 0x7008]
    assert recording.word == f"the guest came to {PC:#x}, where recording ends" and not recording.failed


def test_loads_devices_and_unknown_addresses_are_no_records(fake: Fake) -> None:
    """QEMU 7.2 calls for loads though stores were asked for."""
    accesses = [[0, 3, 0x7000, PC], [0, STORE | DEVICE | 2, 0x8000, PC], [0, STORE | UNKNOWN, 0x9000, PC]]
    found, recording = recorded(fake(accesses=[*accesses, [0, STORE, 0xA000, PC]]))
    assert found["gva"].tolist() == [0xA000]
    assert (recording.counts.devices, recording.counts.unknown, recording.counts.taken) == (1, 1, 1)


def test_a_full_ring_holds_the_guest_and_loses_nothing(fake: Fake) -> None:
    found, recording = recorded(fake(run=[1, 20000]), capacity=64)
    assert found["pc"].tolist() == list(range(0x1000, 0x1000 + 20000))
    assert recording.counts.waits > 0


def test_a_store_under_a_guard_holds_its_vcpu_until_the_verdict(fake: Fake) -> None:
    """The one over two pages waits for the verdict on both of its records."""
    accesses = [[0, STORE | 3, gva, PC] for gva in (0x7000, 0x7080, 0x7FFC, 0x7100)]
    with Recording(fake(accesses=accesses), Wanted()) as recording:
        masks = np.zeros(16, dtype=np.uint32)
        masks[6], masks[9] = 1 << 1, 1  # stand-in: 0x7000 lies at 0x6000, 0x8000 at 0x9000
        recording.guard(masks)
        found, seen, verdicts = [], [], iter((1, 2, 3, 4))
        for records in recording:
            found += records["gva"].tolist()
            if len(records) == 0 and len(found) and recording.held >= len(found):
                seen.append((len(found), recording.held))
                recording.judge(next(verdicts))
    assert found == [0x7000, 0x7080, 0x7FFC, 0x8000, 0x7100]
    assert list(dict.fromkeys(seen)) == [(2, 2), (4, 4)]
    assert len(seen) == 4, "each held one went on with the verdict on itself, and not before"


def test_a_held_guest_is_let_go_when_it_is_stopped_and_ended_where_it_stands(fake: Fake) -> None:
    for stop in (Recording.stop, lambda recording: recording.end("a tool stopped the guest")):
        with Recording(
            fake(accesses=[[0, STORE, 0x7000, PC], [0, STORE, 0x9000, PC]], sleep=60), Wanted()
        ) as recording:
            recording.guard(np.full(16, 0xFFFFFFFF, dtype=np.uint32))
            taken = 0
            for records in recording:
                taken += len(records)
                if recording.held == 1:
                    stop(recording)
    assert (taken, recording.word, recording.failed) == (1, "a tool stopped the guest", False)


def test_a_guest_that_was_ended_does_not_go_on_when_its_reader_leaves(fake: Fake) -> None:
    """The reader leaves in the middle, as a body does whose connection is lost: the waiting vCPU is let go then."""
    with Recording(fake(accesses=[[0, STORE, 0x7000, PC], [0, STORE, 0x9000, PC]]), Wanted()) as recording:
        recording.guard(np.full(16, 0xFFFFFFFF, dtype=np.uint32))
        for _ in recording:
            if recording.held == 1:
                recording.end("a tool stopped the guest")
                recording.end("nobody judges it any more", failed=True)
                break
    assert (recording.qemu.status, recording.counts.taken) == (-signal.SIGKILL, 1)
    assert (recording.word, recording.failed) == ("a tool stopped the guest", False)


def test_a_verdict_that_comes_late_holds_nobody_again() -> None:
    masks = np.full(1, 0xFFFFFFFF, dtype=np.uint32)
    with Ring(64) as ring, mmap.mmap(ring.fds[0], layout.HEADER_BYTES) as memory:
        found = []
        steps: list[Callable[[], None]] = [lambda: ring.guard(masks), lambda: ring.judge(3), ring.let_go]
        for step in steps * 2:
            step()
            header = np.frombuffer(memory[:], dtype=layout.HEADER, count=1)
            found.append((int(header["guarding"][0]), int(header["judged"][0])))
    let_go = (0, (1 << 64) - 1)
    assert found == [(1, 0), (1, 3), let_go, let_go, let_go, let_go]


def test_vcpus_have_one_order_and_each_keeps_its_own(fake: Fake) -> None:
    found, _ = recorded(fake(run=[3, 20000]), capacity=256)
    assert len(found) == 60000
    for vcpu in range(3):
        assert found["pc"][found["vcpu"] == vcpu].tolist() == list(range(0x1000, 0x1000 + 20000))


@pytest.mark.parametrize("vcpus", [1, 3])
def test_of_so_many_stores_of_each_vcpu_the_first_is_recorded(fake: Fake, vcpus: int) -> None:
    """What the others store at the same time does not matter."""
    found, _ = recorded(fake(run=[vcpus, 1000]), Wanted(sample=7), capacity=64)
    for vcpu in range(vcpus):
        assert found["pc"][found["vcpu"] == vcpu].tolist() == list(range(0x1000, 0x1000 + 1000, 7))


def test_a_sample_begins_where_recording_does_and_has_stores_over_two_pages_whole(fake: Fake) -> None:
    """Loads do not count; stores to addresses that were not asked for do."""
    gvas = (0x7000, 0x9000, 0x7FFC, 0x7010, 0x7FFC, 0x9010)
    accesses = [[0, STORE | 3, 0x7000, 0x1000], *([0, what | 3, gva, PC] for gva in gvas for what in (0, STORE))]
    found, recording = recorded(fake(accesses=accesses), Wanted(start_pc=PC, sample=2))
    assert found["gva"].tolist() == [0x7000, 0x7FFC, 0x8000, 0x7FFC, 0x8000]
    assert recording.identity()["sample"] == 2
    found, recording = recorded(fake(accesses=accesses), Wanted(start_pc=PC, sample=2, high=0x9000))
    assert found["gva"].tolist() == [0x7000, 0x7FFC, 0x7FFC]


def test_recording_starts_where_it_is_told_and_ends_after_so_many(fake: Fake) -> None:
    marked = [[0, STORE, gva, PC if gva % 2 else 0x1000] for gva in range(0x7000, 0x7010)]
    found, _ = recorded(fake(accesses=marked), Wanted(start_pc=PC, start_n=3))
    assert found["gva"].tolist() == list(range(0x7005, 0x7010))
    found, recording = recorded(fake(accesses=marked, sleep=60), Wanted(most=5))
    assert found["gva"].tolist() == list(range(0x7000, 0x7005))
    assert recording.word == "as many stores as were asked for" and not recording.failed


def test_a_start_that_never_comes_is_told(fake: Fake) -> None:
    with Recording(fake(accesses=[[0, STORE, 0x7000, 0x1000]]), Wanted(start_pc=PC)) as recording:
        assert sum(len(records) for records in recording) == 0
    assert recording.word == f"the guest never came to {PC:#x} 1 times: nothing recorded"


def test_other_addresses_are_left_out_and_counted(fake: Fake) -> None:
    accesses = [[0, STORE | 3, gva, PC] for gva in (0x6FF0, 0x6FF8, 0x7000, 0x7100)]
    found, recording = recorded(fake(accesses=accesses), Wanted(low=0x7FFC, high=0x8000))
    assert found["gva"].tolist() == [0x6FF8]  # only its last bytes are wanted
    assert recording.counts.elsewhere == 3


def test_what_interface_1_does_not_know_the_address_of_is_left_out(fake: Fake) -> None:
    """QEMU 7.2 gives offsets in the block of RAM for firmware and video memory, which lie after those of the guest."""
    accesses = [[0, STORE, 0x2000000, PC], [0, STORE, 0x7000, PC]]
    assert recorded(fake(accesses=accesses, ram=1 << 24, interface=1))[0]["gva"].tolist() == [0x7000]


def test_the_end_of_a_guest_is_told(fake: Fake) -> None:
    event = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}
    one = [[0, STORE, 0x7000, PC]]
    assert recorded(fake(accesses=one, event=event))[1].word.startswith("the guest reset")
    found, killed = recorded(fake(accesses=one, signal=9))
    assert (len(found), killed.word, killed.failed) == (1, "QEMU was ended by SIGKILL", True)


def test_a_reader_that_vanishes_ends_the_recording_and_not_the_guest(fake: Fake, tmp_path: Path) -> None:
    """The reader dies with a full ring; the guest, which waits for it, is let go, goes on without a ring, and ends
    when it is told to (the stand-in heeds that between its stores)."""
    command = fake(run=[1, 100000], sleep=60)
    reader = (
        "import os, sys, time; from capture.recording import *\n"
        "with Recording(sys.argv[1:], Wanted(), 64) as recording:\n"
        "    print(recording.qemu._process.pid, flush=True); recording.qemu.go(); time.sleep(2); os._exit(9)\n"
    )
    with (
        (tmp_path / "said").open("w+b") as said,
        subprocess.Popen([sys.executable, "-c", reader, *command], stdout=subprocess.PIPE, stderr=said) as process,
    ):
        assert process.stdout is not None
        pid = int(process.stdout.readline())  # its end comes with the guest's
        pidfd = os.pidfd_open(pid)
        assert process.wait(120) == 9
        until(lambda: b"subpage-capture" not in _mapped(pid))
        assert not select.select([pidfd], [], [], 0)[0], "the guest has ended"
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], 60)[0], "the guest still waits"
        os.close(pidfd)
        said.seek(0)
        assert b"the reader has gone; the guest goes on and is not recorded any more" in said.read()


def _mapped(pid: int) -> bytes:
    """The files that a process has mapped and open."""
    opened = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            opened.append(str(path.readlink()))
    return Path(f"/proc/{pid}/maps").read_bytes() + "\n".join(opened).encode()


def test_another_version_of_the_ring_is_refused(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layout, "VERSION", layout.VERSION + 1)
    with (
        pytest.raises(CaptureError, match="QEMU ended with status 1 before the guest ran"),
        Recording(fake(), Wanted()),
    ):
        pass
    assert "was built for another version of its reader" in capfd.readouterr().err


def test_a_ring_has_a_power_of_two_of_records() -> None:
    with pytest.raises(ValueError, match="a power of two of records, not 100"):
        Ring(100)


# What cannot be recorded


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("-enable-kvm",), "-enable-kvm: under kvm the guest runs on the processor, where no plugin sees its stores"),
        (("-accel", "kvm,thread=single"), "-accel kvm,thread=single: under kvm"),
        (("--machine", "q35,accel=kvm:tcg"), "-machine q35,accel=kvm:tcg: under kvm"),
        (("-M", "pc,accel=xen"), "under xen"),
        (("-m", "1G,slots=2,maxmem=4G"), "-m 1G,slots=2,maxmem=4G: a guest whose memory can grow"),
        (("-incoming", "defer"), "-incoming: a guest that arrives by migration"),
        (("-daemonize",), "-daemonize: QEMU must stay in the foreground"),
    ],
)
def test_command_lines_that_leave_nothing_to_see_are_refused(fake: Fake, arguments: tuple[str, ...], rule: str) -> None:
    with pytest.raises(CaptureError) as refused:
        program_of(fake(*arguments))
    assert rule in str(refused.value)


def test_programs_that_cannot_record_are_refused(fake: Fake) -> None:
    with pytest.raises(CaptureError, match="there is no such program; on Debian and Ubuntu: apt-get install qemu"):
        program_of(["qemu-system-nowhere"])
    with pytest.raises(CaptureError, match="which guest"):
        program_of([])
    with pytest.raises(CaptureError, match="is not a QEMU"):
        program_of(fake(version="something else\n"))
    with pytest.raises(CaptureError, match="was built without TCG plugins"):
        program_of(fake(pluginless=True))
    assert program_of(fake()).version == "10.0.2"


@pytest.mark.parametrize(
    ("guest", "rule"),
    [
        ({"kvm": True}, "QEMU uses KVM"),
        ({"ram": MOST_RAM_OF_INTERFACE_1 + (1 << 20), "interface": 1}, "wrong addresses above 4 GiB: at most -m 3G"),
        ({"status": 1}, "QEMU ended with status 1 before the guest ran"),
        ({"target": "aarch64"}, "QEMU ended with status 1 before the guest ran"),
    ],
)
def test_guests_that_cannot_be_recorded_are_refused_before_they_run(fake: Fake, guest: Any, rule: str) -> None:
    with pytest.raises(CaptureError) as refused, Recording(fake(**guest), Wanted()):
        pass
    assert rule in str(refused.value)
