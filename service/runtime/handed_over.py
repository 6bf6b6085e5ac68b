"""Footprints built by a cluster of Ray, through a process that speaks to it: this one knows nothing of Ray."""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from engine.footprint.places import ROW_GROUP, WRITTEN_BYTES, Footprint
from engine.trace.readers import Budget
from service.problems import ClusterUnavailable
from service.runtime.cluster_child import CLUSTER, DONE, FAULT, LOG, RECORDS, SHARE
from service.runtime.source_builds import Allowed, SourceFault, SourcesRequest, document_of
from service.runtime.source_files import Check
from service.runtime.work_progress import Told

logger = logging.getLogger("subpage.cluster")

_ROOT = Path(__file__).parents[2]
_LOOK_SECONDS = 0.2
_END_SECONDS = 3.0  # that the process has to cancel what is under way
_LONGEST_LINE = 1 << 16
_REPORTED = 2000  # last characters of what a process said that ended by itself


class Building:
    """A footprint of many files by the cluster at ``address``. Blocking, for a thread of its own."""

    def __init__(
        self, address: str, wanted: SourcesRequest, allowed: Allowed, check: Check, room: Budget, folder: Path | None
    ) -> None:
        """``room`` is the memory of the footprint, whose file is put aside in ``folder``."""
        self._document = {"cluster": address, **document_of(wanted, allowed)}
        self._check, self._room, self._folder = check, room, folder

    def footprint(self, told: Told) -> Footprint:
        """Raises InvalidValue, LimitExceeded, ShareExceeded, ClusterUnavailable, and what ``check`` does."""
        from engine.footprint import stored  # noqa: PLC0415 - the Arrow library is 33 MB

        with tempfile.TemporaryFile(dir=self._folder) as out, tempfile.TemporaryFile(dir=self._folder) as said:
            with self._begun(out, said) as process:
                self._follow(process, told, said)
            out.seek(0)
            found = stored.read(out, self._room, self._check)
        self._room.check(min(len(found), ROW_GROUP) * WRITTEN_BYTES, "the file of a footprint")
        return found

    @contextmanager
    def _begun(self, out: IO[bytes], said: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
        # -P: what is called `service` in the current folder is another one.
        command = [sys.executable, "-P", "-m", "service.runtime.cluster_child", str(out.fileno())]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            pass_fds=(out.fileno(),),
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # how it ended is told by its end
                process.stdin.write(json.dumps(self._document).encode() + b"\n")
                process.stdin.flush()
            yield process
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def _follow(self, process: subprocess.Popen[bytes], told: Told, said: IO[bytes]) -> None:
        """Until it says that it is done."""
        assert process.stdout is not None
        for line in self._lines(process.stdout):
            if DONE in line:
                return
            if FAULT in line:
                raise SourceFault(*line[FAULT]).raised()
            if CLUSTER in line:
                logger.warning("the cluster cannot build a footprint: %s", line[LOG])
                raise ClusterUnavailable(f"the cluster (SUBPAGE_RAY_ADDRESS) cannot do it: {line[CLUSTER]}")
            told.records_done, told.share = int(line[RECORDS]), float(line[SHARE])
        status = process.wait()
        said.seek(0)
        logger.error(
            "the process of a cluster ended with status %s: %s",
            status,
            said.read()[-_REPORTED:].decode(errors="replace"),
        )
        raise ClusterUnavailable("the cluster (SUBPAGE_RAY_ADDRESS) was lost: the log of the service says more")

    def _lines(self, pipe: IO[bytes]) -> Iterator[dict[str, Any]]:
        """What it says, as it comes. Raises what ``check`` does."""
        os.set_blocking(pipe.fileno(), False)
        left = b""
        with selectors.DefaultSelector() as waiting:
            waiting.register(pipe, selectors.EVENT_READ)
            while True:
                self._check()
                if not waiting.select(_LOOK_SECONDS):
                    continue
                data = os.read(pipe.fileno(), _LONGEST_LINE)
                if not data:
                    return
                *lines, left = (left + data).split(b"\n")
                yield from map(json.loads, lines)
