"""Method (o): a trace over HTTP taken apart: what each part of the way takes alone, beside the whole."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from bench.data import Policy, Trace
from bench.http_replay import CONTENT_TYPES, HttpReplay, body_of
from bench.replay import ColumnReplay
from bench.servers import call, service, serving
from bench.timing import Method
from engine.trace.readers import open_trace

KINDS = ("arrow", "parquet", "compact")
# Servers that read and discard, each with all that those before it do.
SINKS = {"kernel": "sockets", "kernel, uvicorn": "uvicorn", "kernel, our connections": "connections"}
ARROW, DECODED, REPLAYED, WHOLE = "Arrow's library", "our reader", "replay", "all of it"


class Posted:
    """A body that nobody wants."""

    def __init__(self, port: int, kind: str, body: bytes) -> None:
        self._port, self._kind, self._body = port, kind, body

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        call(self._port, "POST", "/", self._body, CONTENT_TYPES[self._kind])


class ByLibrary:
    """The columns that a replay needs, decoded by Arrow's own reader, one thread, and dropped."""

    def __init__(self, kind: str, body: bytes) -> None:
        self._kind, self._body = kind, body

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        source = pa.BufferReader(self._body)
        if self._kind == "parquet":
            file = pq.ParquetFile(source)
            for _ in file.iter_batches(1 << 17, columns=["gpa", "size"], use_threads=False):
                pass
            return
        options = pa.ipc.IpcReadOptions(use_threads=False)
        for _ in pa.ipc.open_stream(source, options=options):
            pass


class ByReader:
    """The chunks that a replay takes, made by the reader of the service, and dropped."""

    def __init__(self, kind: str, body: bytes) -> None:
        self._format, self._body = "parquet" if kind == "parquet" else "arrow", body
        self.records = 0

    def prepare(self) -> None:
        """Nothing to do."""

    def run(self) -> None:
        reader = open_trace(self._format, io.BytesIO(self._body), late=True, ahead=True)
        self.records = sum(len(chunk) for chunk in reader)


@contextmanager
def parts(trace: Trace, policy: Policy) -> Iterator[dict[str, dict[str, Method]]]:
    """The methods of each kind of body, by the name of the part."""
    with ExitStack() as held:
        ports = {name: held.enter_context(serving(("bench.sink", sink), "/")) for name, sink in SINKS.items()}
        port = held.enter_context(service())
        found: dict[str, dict[str, Method]] = {}
        for kind in KINDS:
            body = body_of(kind, trace)
            found[kind] = {
                **{name: Posted(ports[name], kind, body) for name in SINKS},
                ARROW: ByLibrary(kind, body),
                DECODED: ByReader(kind, body),
                REPLAYED: ColumnReplay(trace, policy),
                WHOLE: HttpReplay(port, kind, trace, policy),
            }
        yield found
