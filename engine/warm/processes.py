"""Steps in several processes, each of which compiles what the others have not: as many as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue

from engine.warm.kernels import Kernel, compiled, folder

# Called with how many kernels are compiled, of how many, and the seconds since the beginning.
Report = Callable[[int, int, float], None]

_LOOK_SECONDS = 0.5
_ROOT = Path(__file__).parents[2]


def silent(done: int, of: int, seconds: float) -> None:
    """The report of those who are not told."""


class CompilerEnded(Exception):
    """A process that compiled came to its end, most likely for want of memory; the text says how."""


def compile_in_processes(
    steps: Iterable[str],
    wanted: set[Kernel],
    report: Report = silent,
    *,
    processes: int | None = None,
    gone: threading.Event | None = None,
) -> None:
    """Take ``steps`` in processes of their own until the code of all ``wanted`` kernels is on disk.

    ``gone`` gives up at once when it is set. Raises CompilerEnded.
    """
    todo: SimpleQueue[str] = SimpleQueue()
    for step in steps:
        todo.put(step)
    count = min(processes or len(os.sched_getaffinity(0)), todo.qsize())
    began = time.monotonic()
    with ExitStack() as running:
        workers = [running.enter_context(_Worker(todo)) for _ in range(count)]
        while any(worker.is_alive() for worker in workers):
            report(compiled(wanted), len(wanted), time.monotonic() - began)
            next(worker for worker in workers if worker.is_alive() or worker is workers[-1]).join(_LOOK_SECONDS)
            if gone is not None and gone.is_set():
                return
    ended = [worker.status for worker in workers if worker.status]
    if ended:
        raise CompilerEnded(f"a process that compiles kernels ended with status {ended[0]}")
    done = compiled(wanted)
    report(done, done, time.monotonic() - began)


class _Worker(threading.Thread):
    """Hands steps to one process, the next when it has done one. Leaving the context ends the process."""

    def __init__(self, todo: SimpleQueue[str]) -> None:
        super().__init__(name="compile", daemon=True)
        self.status = 0
        self._todo = todo
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.warm", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "SUBPAGE_KERNEL_CACHE": str(folder().parent)},
            text=True,
        )

    def __enter__(self) -> _Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.join()

    def run(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process as process, process.stdin as orders, process.stdout as answers:  # type: ignore[union-attr]
            while True:
                try:
                    step = self._todo.get_nowait()
                except Empty:
                    return
                try:
                    orders.write(f"{step}\n")
                    orders.flush()
                except BrokenPipeError:
                    break
                if not answers.readline():
                    break
            self.status = process.wait()
