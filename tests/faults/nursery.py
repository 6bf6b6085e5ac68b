"""Servers that start in milliseconds: a process that has imported everything, and forks one whenever it is told to.

    python -m tests.faults.nursery

reads lines of JSON with settings from standard input; each becomes a server in a process of its own, which prints where
it listens as ``subpage serve`` does. The end of the input ends all of them.
"""

from __future__ import annotations

import json
import logging
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
    """One forked server. ``log`` grows as it writes: see ``service.storage.keeper`` for what it says of commits."""

    pid: int
    url: str
    log: list[str] = field(default_factory=list)

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        while self.alive():
            threading.Event().wait(0.001)


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

    def start(self, **settings: Any) -> Server:
        """A new server, listening."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        found = re.search(r"(http://\S+)", self._process.stdout.readline())
        assert found is not None
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
    from service import server
    from service.settings import Settings
    from service.storage import keeper, reader, traces

    assert keeper and reader and traces  # imported for the children
    warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    children = []
    for line in sys.stdin:
        settings = Settings(port=0, warm_up=False, **json.loads(line))
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
            logging.getLogger("subpage.store").setLevel(logging.DEBUG)
            sys.stdout.write(f"{os.getpid()}\n")
            sys.stdout.flush()
            os._exit(server.run(settings))
        children.append(pid)
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
