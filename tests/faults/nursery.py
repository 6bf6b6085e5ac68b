"""Servers that start in milliseconds: a process that has imported everything, and forks one whenever it is told to.

    python -m tests.faults.nursery

reads lines of JSON from standard input: settings, a umask, and a file for standard error. Each becomes a server in a
process of its own, which prints where it listens as ``subpage serve`` does. Without a file it writes to standard error
of this process, and of commits what ``service.storage.writer`` says at debug. The end of the input ends all of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """One forked server. ``log`` grows as it writes, unless it writes to a file."""

    pid: int
    url: str
    log: list[str] = field(default_factory=list)

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """SIGKILL or another signal, and wait until it is gone."""
        os.kill(self.pid, number)
        while self.alive():
            threading.Event().wait(0.001)

    def status(self, name: str) -> int:
        """Bytes that the system counts: VmRSS, what it has now; VmHWM, the most that it has had."""
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None, f"the server is gone: {self.log[-20:]}"
        return int(found[1]) << 10


class Nursery:
    """The parent of the servers, from the outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.server: Server | None = None
        self.on_line: Callable[[str], None] = lambda line: None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self.server is not None:
                self.server.log.append(line.rstrip())
            self.on_line(line)

    def start(self, *, stderr: Path | None = None, umask: int = 0o022, **settings: Any) -> Server:
        """A new server, listening."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"settings": settings, "umask": umask, "stderr": stderr}
        self._process.stdin.write(json.dumps(order, default=str) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        said = self._process.stdout.readline()
        found = re.search(r"(https?://\S+)", said)
        assert found is not None, said
        self.server = Server(pid, found[1])
        return self.server


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery for the time of the context."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nursery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def main() -> None:
    from engine.warm.steps import warm
    from service import app, server
    from service.runtime import stored_repository
    from service.storage import reader, writer

    assert app and server and writer and reader and stored_repository  # imported for the children
    warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(_serve(**json.loads(line)))
        children.append(pid)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _serve(settings: dict[str, Any], umask: int, stderr: str | None) -> int:
    """What a child does."""
    from service import server
    from service.settings import Settings

    os.umask(umask)
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    else:
        settings = {"log_level": "debug", **settings}
    print(os.getpid(), flush=True)  # noqa: T201
    try:
        return server.run(Settings(**{"port": 0, "warm_up": False, **settings}))
    except Exception as error:  # noqa: BLE001 - the parent is told, where it waits for the address
        print(repr(error), flush=True)  # noqa: T201
        return 1


if __name__ == "__main__":
    main()
