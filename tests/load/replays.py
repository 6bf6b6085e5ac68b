"""Replays of the boot of a real guest, one after the other, for a while.

    python -m tests.load.replays PORT SECONDS LIMIT MACHINE...

A process beside the one that sends the short calls: what this one does must not delay them. Each machine has a thread.
It prints ``started`` when all machines are replaying, and at the end a line of JSON.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time

from bench.data import expected, load_trace

POLICY, TRACE = "kernel_control_data", "boot"
ARROW = "application/vnd.apache.arrow.stream"
PIECE = 1 << 20


class Replays:
    """The replays of one machine after the other; ``errors`` says what was wrong with an answer."""

    def __init__(self, port: int, seconds: float, limit: int) -> None:
        trace = load_trace(TRACE, limit or None)
        self._port = port
        self._body = memoryview(trace.arrow())
        self._records = len(trace)
        self._violations = None if limit else expected(POLICY, TRACE).violations
        self._seconds = seconds
        self.finished = 0
        self.errors: list[str] = []

    def run(self, vm: str, begun: threading.Barrier) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        begun.wait()
        until = time.monotonic() + self._seconds
        try:
            while time.monotonic() < until and not self.errors:
                pieces = (self._body[at : at + PIECE] for at in range(0, len(self._body), PIECE))
                headers = {"Content-Type": ARROW, "Content-Length": str(len(self._body))}
                connection.request("POST", f"{vm}/traces", pieces, headers)
                reply = connection.getresponse()
                self._take(reply.status, reply.read())
        except OSError as error:
            self.errors.append(f"a replay broke: {error!r}")
        finally:
            connection.close()

    def _take(self, status: int, answer: bytes) -> None:
        if status != 201:
            self.errors.append(f"a replay was answered {status} {answer[:300]!r}")
            return
        result = json.loads(answer)
        self.finished += 1
        if result["records"] != self._records:
            self.errors.append(f"{result['records']} records, not {self._records}")
        if self._violations is not None and result["violations"] != self._violations:
            self.errors.append(f"{result['violations']} violations, not {self._violations}")


def main() -> int:
    port, seconds, limit, *vms = sys.argv[1:]
    replays = Replays(int(port), float(seconds), int(limit))
    begun = threading.Barrier(len(vms) + 1)
    threads = [threading.Thread(target=replays.run, args=(vm, begun)) for vm in vms]
    for thread in threads:
        thread.start()
    begun.wait()
    sys.stdout.write("started\n")
    sys.stdout.flush()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps({"finished": replays.finished, "errors": replays.errors}) + "\n")
    return 1 if replays.errors else 0


if __name__ == "__main__":
    sys.exit(main())
