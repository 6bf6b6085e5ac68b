"""Symbols that a guest shows itself while it is watched live: its machine has names, and a policy, from then on."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from capture.errors import CaptureError
from capture.recording import Recording
from capture.serial_line import symbols_from
from service.cli.connection import Service
from service.cli.live_stream import Machine
from service.cli.record import start_of
from service.platform.failures import Failure


class GuestSymbols:
    """Takes them in a thread, has the machine protect what the policy says, and tells the guest that this is done."""

    def __init__(self, service: Service, machine: Machine, recording: Recording, start: str | None) -> None:
        self._service, self._machine, self._recording, self._start = service, machine, recording, start
        self._failure: Exception | None = None
        self._taken = False

    @contextmanager
    def expected(self) -> Iterator[None]:
        """While the guest runs. Raises Failure at the end where they did not come, or were of no use."""
        ending = threading.Event()
        thread = threading.Thread(target=self._run, args=(ending,), name="symbols", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
        if self._failure is not None:
            raise Failure(str(self._failure))
        if not self._taken:
            rule = "write /proc/kallsyms to the guest's last serial line (docs/live-guest.md)"
            raise Failure(f"--kallsyms-from-guest: the guest has shown no symbols: {rule}")

    def _run(self, ending: threading.Event) -> None:
        try:
            text = symbols_from(self._recording.line, lambda: not ending.is_set())
            if text is None:
                return
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "kallsyms"
                path.write_bytes(text)
                with self._service.client() as client:
                    self._machine.name_and_protect(client, path)
                if self._start is not None:
                    self._recording.start_at(start_of(self._start, path)[0])
            self._taken = True
            with suppress(OSError):
                self._recording.line.sendall(b"\n")
        except (Failure, CaptureError) as error:
            self._failure = error
            self._recording.end("its symbols could not be used")
