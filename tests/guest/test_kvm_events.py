"""Events of KVM as a kernel prints them, and as trace-cmd does: of a machine that runs under the KVM of a guest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from capture.errors import CaptureError
from tests.support.kvm_machine import FAULTS, GCC, MMIO, QEMU, TRACE_CMD, traced_in_guest
from tests.support.real_tools import accesses_of

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(
        QEMU is None or GCC is None or shutil.which("apt-get") is None,
        reason="needs qemu-system-x86_64, gcc and apt-get",
    ),
]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    try:
        return traced_in_guest(tmp_path_factory.mktemp("guest"))
    except CaptureError as error:
        pytest.skip(str(error))


def check(trace: Path) -> None:
    """Every access to memory that nobody has, and every fault with its instruction; exits are counted and left out."""
    found, skipped = accesses_of(trace, "ftrace")
    mmio = [(one.gpa, one.size, one.access) for one in found if not one.pc]
    assert mmio == [one[:3] for one in MMIO]
    assert [(one.pc, one.gpa, one.access) for one in found if one.pc] == list(FAULTS)
    assert {one.vcpu for one in found} == {0}
    times = [one.time for one in found]
    assert times == sorted(times) and times[0] > 0
    assert any(reason.startswith("kvm_exit has no address") for reason in skipped)


def test_text_of_tracefs(traced: tuple[Path, Path]) -> None:
    check(traced[0])


@pytest.mark.skipif(TRACE_CMD is None, reason="needs trace-cmd")
def test_report_of_trace_cmd(traced: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    with report.open("wb") as out:
        subprocess.run([str(TRACE_CMD), "report", str(traced[1])], stdout=out, check=True, timeout=60)
    check(report)
