"""hookguest of libkvmi, as it is built, against a machine: its own words tell what it has seen.

SUBPAGE_HOOKGUEST and SUBPAGE_HOOKGUEST_V6 are where it is, of libkvmi's master and of its branch kvmi-v6; docs/kvmi.md
has how to build it. Without them these are left out.
"""

from __future__ import annotations

import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.settings import Settings
from tests.support.http import access, new_vm
from tests.support.server import running
from tests.support.tools import trace
from tests.support.waiting import until

BUILDS = {"v7": os.environ.get("SUBPAGE_HOOKGUEST"), "v6": os.environ.get("SUBPAGE_HOOKGUEST_V6")}
PAGES = range(1, 21)


class Said:
    """What a program has written to its terminal."""

    def __init__(self, terminal: int) -> None:
        self.text = ""
        self._terminal = terminal
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while piece := self._piece():
            self.text += piece.decode(errors="replace").replace("\r", "")

    def _piece(self) -> bytes:
        try:
            return os.read(self._terminal, 4096)
        except OSError:
            return b""

    def __contains__(self, words: str) -> bool:
        return words in self.text


@contextmanager
def hookguest(program: str, path: Path) -> Iterator[Said]:
    """The program, listening at a path. It wants a terminal, to which it writes line by line."""
    terminal, its_end = pty.openpty()
    libraries = f"{Path(program).parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    process = subprocess.Popen(
        [program, str(path)],
        stdin=subprocess.DEVNULL,
        stdout=its_end,
        stderr=its_end,
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
    )
    os.close(its_end)
    try:
        yield Said(terminal)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize("dialect", [name for name, program in BUILDS.items() if program] or [None])
def test_hookguest_sees_the_writes_of_a_replay(dialect: str | None, tmp_path: Path) -> None:
    if dialect is None:
        pytest.skip("SUBPAGE_HOOKGUEST is not set")
    program = BUILDS[dialect]
    assert program is not None
    tmp_path.chmod(0o700)
    with running(Settings(warm_up=False, kvmi_sockets=(f"unix:{tmp_path}",))) as service:
        client = service.client
        vm = new_vm(client, vcpus=[{"id": 0}, {"id": 3}])
        # It protects the twenty pages from CR3 on.
        assert client.put(f"{vm}/vcpus/0/vmcs", json={"cr3": "0x1000"}).status_code == 200
        with hookguest(program, tmp_path / "tool") as said:
            body = {"connect": f"unix:{tmp_path}/tool", "dialect": dialect, "reconnect": 0.1}
            assert client.put(f"{vm}/kvmi", json=body).status_code == 201
            until(lambda: "Reply with CONTINUE (vcpu1)" in said)
            assert "Max gfn: 0x1000" in said and "Starting #PF test with CR3 0x1000" in said
            query = {"gfn": PAGES.start, "npages": len(PAGES)}
            shown = client.get(f"{vm}/page-access", params=query).json()["pages"]
            assert {page["access"] for page in shown} == {"r-x"}
            assert access(client, vm, gpa="0x1008", vcpu=3, on_violation="ask")["landed"]
            rows = [gfn << 12 | 8 for gfn in PAGES for _ in range(2)]
            replayed = client.post(f"{vm}/traces", params={"on_violation": "ask"}, json=trace(rows)).json()
            # The first page is open by then; each of the others is opened at its first write.
            assert (replayed["writes"], replayed["violations"]) == (len(rows), len(PAGES) - 1)
            assert said.text.count("Reply with RETRY") == len(PAGES)
            for gfn in PAGES:
                assert f"gpa {gfn << 12 | 8:#x} access -w-" in said
            assert client.delete(f"{vm}/kvmi").status_code == 204
            until(lambda: "Broken pipe" in said)
