"""A guest as a body that comes while it runs, and what a service says of it meanwhile."""

from __future__ import annotations

import io
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import pyarrow as pa

from capture.qemu import Guest
from capture.recording import Recording
from service.cli.connection import Service, Unanswered
from service.cli.demo import report_of
from service.cli.guests import Watch
from service.cli.live_memory import make_machine
from service.cli.live_verdicts import Verdicts, end_if_stopped
from service.cli.recorded_files import COMPRESSED, SMALL, WORDS, schema_of
from service.cli.rules import Rules
from service.cli.show import printable
from service.cli.symbol_policies import read_symbols

if TYPE_CHECKING:
    import subpage
    from engine.symbols.table import SymbolTable
    from service.api.protection.policies import ProtectionRequest

_SIGN_OF_LIFE = 1.0  # seconds after which an idle guest sends an empty batch
_LOOK_SECONDS = 0.5
_TOLD = 20  # violations that are told one by one
_LISTED = 1000  # exit records that the writers are taken from


def bare_client(url: str) -> httpx2.Client:
    """For a service of our own."""
    return httpx2.Client(base_url=url, timeout=600.0)


class Machine:
    """The machine of a service that stands for the guest's processor."""

    def __init__(self, vm: subpage.Vm, policy: ProtectionRequest, guest: Guest, memory: Sequence[str] = ()) -> None:
        """``memory``: lines that say what is read of it."""
        self._vm, self._policy, self._guest, self.memory = vm, policy, guest, memory
        self._covered: dict[str, Any] = {"pages": 0, "subpages": 0}
        self._symbols: SymbolTable | None = None

    @classmethod
    def make(cls, client: subpage.Client, guest: Guest, policy: ProtectionRequest) -> Machine:
        """With slots like the guest's RAM; nothing is protected yet. Raises Failure."""
        document = {"name": f"live {policy.name}"[:200], "vcpus": guest.vcpus, "spp": True}
        vm, memory = make_machine(client, guest, document)
        return cls(vm, policy, guest, memory)

    def name_and_protect(self, client: subpage.Client, symbols: Path | None) -> None:
        """The symbols, if there are any, and then what the policy protects. Raises Failure."""
        vm, policy = client.vm(self._vm.id), self._policy
        if symbols is not None:
            # Before the guest runs there is no kernel in its memory to be found.
            vm.load_symbols(symbols, slide="0x0", phys_base="0x0")
            self._symbols = read_symbols(symbols, slide=0, phys_base=0).table
        self._covered = vm.protect(policy.model_dump(mode="json", exclude_unset=True), name=policy.name)

    def stream(self, recording: Recording, watch: Watch, every: str, on_violation: str) -> dict[str, Any]:
        """Let the guest run; the trace that came of it. Raises Unanswered, CaptureError."""
        import subpage

        media = "application/vnd.apache.arrow.stream"
        body = _body(recording, watch)
        result: dict[str, Any]
        try:
            result = self._vm.replay(body, media=media, publish_every=every, on_violation=on_violation).document
        except subpage.Error:
            # An answer ends the trace, and the service with it the connection over which the guest comes.
            stopped = self._stopped() if on_violation == "ask" else None
            if stopped is None:
                raise
            result = stopped
        end_if_stopped(recording, result)
        return result

    def _stopped(self) -> dict[str, Any] | None:
        """The trace that an answer has stopped, if there is one and the service can be asked."""
        import subpage

        with suppress(subpage.Error):
            for trace in self._vm.traces():
                if trace.document["stopped_at"] is not None:
                    return self._vm.trace(trace.id).document
        return None

    def verdicts(self, service: Service, recording: Recording) -> Verdicts:
        """What holds the guest until its stores are judged. Raises CaptureError."""
        return Verdicts(service, self._vm, recording)

    def answering(self, rules: Rules) -> AbstractContextManager[Any]:
        """A tool that answers by rules."""
        return self._vm.attach(lambda question: rules.answer(question.exit), default_action="allow")

    @property
    def id(self) -> str:
        """The machine's."""
        return self._vm.id

    @contextmanager
    def telling(self, service: Service, watch: Watch) -> Iterator[None]:
        """Tell of violations on standard error while they happen; the first ones each, then how many."""
        ending = threading.Event()

        def look() -> None:
            with suppress(Unanswered), service.client() as client:
                vm, after, told = client.vm(self._vm.id), "0", 0
                while not ending.wait(_LOOK_SECONDS):
                    for event in vm.events(after=after, kinds="violation"):
                        after, told = str(event["id"]), told + 1
                        if told <= _TOLD:
                            sys.stderr.write(f"{printable(_told(event['detail'], self._symbols))}\n")
                    judged = next((trace.records for trace in vm.traces()), 0)
                    lag = max(0, watch.stores - judged) + watch.recording.behind
                    watch.extra = f", {told:,} violations, {lag:,} stores ahead of the verdict"

        thread = threading.Thread(target=look, name="violations", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join(_LOOK_SECONDS * 4)

    def writers(self, result: dict[str, Any]) -> list[str]:
        """Lines that say which function wrote to which object, most often first."""
        found = list(itertools.islice(self._vm.trace(result["id"]).exits(), _LISTED))
        pairs = Counter(
            (name, record.get("writer") or _pc(record) or "?") for record in found for name in record["objects"]
        )
        lines = [printable(f"  {name}: {count:,} writes by {writer}") for (name, writer), count in pairs.most_common()]
        some = f", of the first {_LISTED:,}" if result["violations"] > len(found) else ""
        return [f"Who wrote to what{some}:", *lines] if lines else []

    def report(self, command: str, result: dict[str, Any], seconds: float) -> dict[str, Any]:
        """What ``service.cli.report`` prints."""
        memory = sum(size for _, size in self._guest.ranges)
        return report_of(command, self._policy.name, memory, self._covered, result, seconds)


def _told(detail: dict[str, Any], symbols: SymbolTable | None) -> str:
    """A violation in a line: what was written to, by whom, where."""
    who = ", ".join(detail.get("objects", ())) or "no object"
    pc = _pc(detail)
    writer = symbols.label(int(pc, 16)) if symbols is not None and pc else None
    gva = f" (gva {detail['gva']})" if detail.get("gva") else ""
    by = f" by {writer or pc}" if pc else ""
    return f"violation: {who}: {detail['size']} bytes at {detail['gpa']}{gva}{by}, record {detail['index']:,}"


def _pc(detail: dict[str, Any]) -> str | None:
    """The instruction's address. As a carried column it is text only where JSON's numbers do not reach."""
    pc = detail.get("pc")
    return hex(pc) if isinstance(pc, int) else pc


def _body(recording: Recording, watch: Watch) -> Iterator[bytes]:
    """The records as an Arrow stream, a batch for each run of them, and an empty one now and then. It is compressed:
    every byte of it is copied six times until it is read."""
    schema, sink = schema_of(), io.BytesIO()
    sent = time.monotonic()
    with pa.ipc.new_stream(sink, schema, options=COMPRESSED) as out:
        for records in recording:
            watch.see(records)
            if len(records) or time.monotonic() - sent >= _SIGN_OF_LIFE:
                arrays = [pa.array(np.ascontiguousarray(records[name])) for name in (*WORDS, *SMALL)]
                out.write_batch(pa.record_batch(arrays, schema=schema))
                sent = time.monotonic()
                yield _taken(sink)
    yield _taken(sink)


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data
