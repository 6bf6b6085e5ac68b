"""Holding a guest that is watched live: after a store to what is protected it waits for the verdict of the service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from capture import layout
from capture.errors import CaptureError
from capture.recording import Recording
from service.cli.connection import Service
from service.platform.failures import Failure

if TYPE_CHECKING:
    import subpage

_PAGE_SHIFT = 12
_ALL = 0xFFFFFFFF
_MOST_WINDOW = 1 << 18
_MOST_PAGES = layout.GUARD_BYTES // 4
_POLL_SECONDS = 0.01
# How late the guest may be held for what is protected while it runs.
_LOOK_SECONDS = 0.1
_CHANGES = "lifecycle,memory-slot,protection,subpages,page-access,host-memory"  # events after which bitmaps may differ


class Verdicts:
    """What the recorder is told meanwhile: which sub-pages are protected by now, and up to where stores are judged."""

    def __init__(self, service: Service, vm: subpage.Vm, recording: Recording) -> None:
        """Raises CaptureError for a guest whose memory is too large to be guarded."""
        self._service, self._recording = service, recording
        self._id = vm.id
        end = max(first + size for first, size in recording.guest.ranges)
        if end >> _PAGE_SHIFT > _MOST_PAGES:
            rule = f"guards reach up to {_MOST_PAGES >> 18} GiB, and the guest has memory up to {end / (1 << 30):g} GiB"
            raise CaptureError(f"--on-violation ask: {rule}")
        self._pages = end >> _PAGE_SHIFT
        self._trace: str | None = None
        self._looked = 0.0
        self._seen: tuple[int, int] | None = None
        self._look(vm)

    @contextmanager
    def given(self) -> Iterator[None]:
        """Give them for as long as the context lasts, in a thread."""
        ending = threading.Event()
        thread = threading.Thread(target=self._run, args=(ending,), name="verdicts", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._recording.end("its stores are not judged any more", failed=True)
            raise
        finally:
            ending.set()
            thread.join()

    def _run(self, ending: threading.Event) -> None:
        why = ""
        try:
            with self._service.client() as client:
                vm = client.vm(self._id)
                judged = 0
                while not ending.wait(_POLL_SECONDS):
                    if time.monotonic() - self._looked >= _LOOK_SECONDS:
                        self._look(vm)
                    if self._recording.held > judged:
                        judged = self._judged(vm, judged)
        except Failure as error:
            why = f": {error}"
        finally:
            if not ending.is_set():  # a guest that nobody holds would pass what is asked about
                self._recording.end(f"verdicts do not come any more{why}", failed=True)

    def _judged(self, vm: subpage.Vm, before: int) -> int:
        """Pass on how far the service is."""
        if self._trace is None:
            self._trace = next((trace.id for trace in vm.traces()), None)
            if self._trace is None:
                return before
        trace = vm.trace(self._trace).document
        if not end_if_stopped(self._recording, trace) and trace["resume_at"] > before:
            self._recording.judge(trace["resume_at"])
            return int(trace["resume_at"])
        return before

    def _look(self, vm: subpage.Vm) -> None:
        """Guard anew where something has changed: all bitmaps are 16 MiB, and verdicts wait meanwhile."""
        self._looked = time.monotonic()
        before = self._seen
        events = vm.call("getEvents", query={"kinds": _CHANGES, "after": before[0] if before else None}).json()
        # A grant is part of a replay, and no event of its own.
        self._seen = events["last"], vm.counters()["grants"]
        if before is None or events["events"] or self._seen[1] != before[1]:
            self._guard(vm)

    def _guard(self, vm: subpage.Vm) -> None:
        """What is protected by now is what the guest waits at."""
        masks = np.zeros(self._pages, dtype=np.uint32)
        for gpa, size in self._recording.guest.ranges:  # there are no bitmaps between them
            end = gpa + size >> _PAGE_SHIFT
            for first in range(gpa >> _PAGE_SHIFT, end, _MOST_WINDOW):
                words = vm.subpages(first, min(_MOST_WINDOW, end - first)).numpy()
                masks[first : first + len(words)] = ~words
        for protection in vm.protections():
            for item in protection["objects"]:
                if item["granularity"] == "page":
                    for piece in item["pieces"] or [item]:
                        first, size = int(piece["gpa"], 16), piece["size"]
                        masks[first >> _PAGE_SHIFT : (first + size - 1 >> _PAGE_SHIFT) + 1] = _ALL
        self._recording.guard(masks)


def end_if_stopped(recording: Recording, trace: dict[str, Any]) -> bool:
    """End the guest where it stands if an answer has stopped its trace; whether one has."""
    at = trace["stopped_at"]
    if at is not None:
        recording.end(f"the guest was stopped at record {at:,}, as was answered")
    return at is not None
