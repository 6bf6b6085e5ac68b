"""What the fuzzer is told of this service: bodies that it cannot make up, and where there is something to hit."""

from __future__ import annotations

import json
import zlib
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import ensure_resource_availability

from tests.support.hostile_numbers import HOSTILE_NUMBERS

# The RAM that most machines are given; a random address among 2^64 would never meet a slot, a protection or a table.
RAM = 1 << 24
_ADDRESSES = frozenset({"gpa", "gva", "input_gpa", "address", "addr"})
_PAGES = frozenset({"gfn"})
_COUNTS = frozenset({"npages", "size"})

_records = st.lists(
    st.fixed_dictionaries(
        {"gpa": st.integers(0, RAM - 1) | st.integers(0, (1 << 64) - 1)},
        optional={
            "size": st.integers(0, 65535),
            "access": st.integers(0, 4),
            "vcpu": st.integers(0, 3),
            "gva": st.integers(0, (1 << 64) - 1),
            "kind": st.integers(0, 5),
            "source": st.integers(0, 3),
            "linear": st.integers(0, 16),
            "insn_len": st.integers(0, 16),
            "flags": st.integers(0, 1),
        },
    ),
    max_size=40,
)
_COLUMNS = {"gpa": pa.uint64(), "size": pa.uint16(), "access": pa.uint8(), "vcpu": pa.uint16(), "gva": pa.uint64()}


def _table(records: list[dict[str, int]]) -> pa.Table:
    names = {name for record in records for name in record} | {"gpa"}
    return pa.table(
        {
            name: pa.array([record.get(name) for record in records], _COLUMNS.get(name, pa.uint8()))
            for name in sorted(names)
        }
    )


def _arrow(records: list[dict[str, int]]) -> bytes:
    table = _table(records)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet(records: list[dict[str, int]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(_table(records), sink)
    return sink.getvalue().to_pybytes()


def _lines(records: list[dict[str, int]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@st.composite
def _damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """``whole`` as it is, or cut short, or with one byte changed."""
    content = draw(whole)
    if not content or draw(st.booleans()):
        return content
    at = draw(st.integers(0, len(content) - 1))
    return content[:at] + draw(st.sampled_from([b"", bytes([content[at] ^ 0x41]) + content[at + 1 :]]))


_RECORDS = {
    "application/x-ndjson": _lines,
    "application/vnd.apache.arrow.stream": _arrow,
    "application/vnd.apache.parquet": _parquet,
}
for _media, _made in _RECORDS.items():
    schemathesis.openapi.media_type(_media, _damaged(_records.map(_made)))
schemathesis.openapi.media_type("application/octet-stream", st.binary(max_size=256) | st.integers(0, 4096).map(bytes))


@schemathesis.serializer(*_RECORDS)
def as_it_is(ctx: schemathesis.SerializationContext, value: Any) -> bytes:
    """A body of the strategies above, or the example of the contract."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            value = int(value, 16 if value.startswith("0x") else 10)
        except ValueError:
            return None
    return value if type(value) is int and value >= 0 else None


def near(name: str, value: Any) -> Any:
    """Half of the addresses, page numbers and counts, folded into RAM; the same ones every time."""
    number = _number(value)
    if number is None or number & 1:
        return value
    if name in _ADDRESSES:
        return hex(number % RAM)
    if name in _PAGES:
        return hex(number % (RAM >> 12))
    return hex(number % 256 + 1) if name in _COUNTS and isinstance(value, str) else value


def folded(document: Any) -> Any:
    """``document`` with ``near`` at every depth."""
    if isinstance(document, dict):
        return {
            name: folded(member) if isinstance(member, (dict, list)) else near(name, member)
            for name, member in document.items()
        }
    return [folded(item) for item in document] if isinstance(document, list) else document


# Headers that no operation needs, so that a request with one is as right or wrong as without.
HOSTILE_HEADERS = tuple(
    (name, beginning + value)
    for name, beginning in (
        *(
            ("Last-Event-ID", ""),
            ("Range", "bytes="),
            ("If-Modified-Since", ""),
            ("X-Request-Id", ""),
            ("traceparent", "00-"),
        ),
        *(
            ("Accept-Language", "a;q="),
            ("Cookie", "a="),
            ("Forwarded", "for="),
            ("X-Forwarded-For", ""),
            ("Referer", "/"),
        ),
    )
    for value in ("9" * 5000, "-1", "1e400", "nan", "\xb2", '"' * 5000, "," * 5000, "=\\" * 3000)
)


def hostile(document: Any) -> Any:
    """``folded``, with every twelfth number one that no schema generates and none may be; the same ones every time."""
    if not isinstance(document, dict):
        return document
    changed = folded(document)
    for name, value in document.items():
        if _number(value) is not None and (drawn := zlib.crc32(f"{name}={value}".encode())) % 12 == 0:
            changed[name] = HOSTILE_NUMBERS[drawn // 12 % len(HOSTILE_NUMBERS)]
    return changed


@schemathesis.check
def what_links_lead_to_is_there(ctx: Any, response: Any, case: Any) -> bool | None:
    """As the check of schemathesis, but for KVMI: a machine that was just made is attached to no tool."""
    if case.operation.path.endswith("/kvmi"):
        return None
    return ensure_resource_availability(ctx, response, case)


@schemathesis.hook
def map_query(ctx: schemathesis.HookContext, query: Any) -> Any:
    return hostile(query)


@schemathesis.hook
def filter_query(ctx: schemathesis.HookContext, query: Any) -> bool:
    """No URL longer than the service reads: that is of no operation, but of all of HTTP."""
    return not isinstance(query, dict) or len(urlencode(query, errors="surrogatepass")) < 1 << 12


@schemathesis.hook
def map_path_parameters(ctx: schemathesis.HookContext, path_parameters: Any) -> Any:
    return hostile(path_parameters)


@schemathesis.hook
def map_headers(ctx: schemathesis.HookContext, headers: Any) -> Any:
    """One more in every fourth request that has any; by what it has, so that it is the same every time."""
    drawn = zlib.crc32(repr(headers).encode("utf-8", "surrogatepass"))
    if not headers or drawn % 4:
        return headers
    name, value = HOSTILE_HEADERS[drawn // 4 % len(HOSTILE_HEADERS)]
    return headers if name in headers else {**headers, name: value}


@schemathesis.hook
def map_body(ctx: schemathesis.HookContext, body: Any) -> Any:
    """Addresses as above; a machine made without a slot gets RAM, and SPP with every other name."""
    if not isinstance(body, dict):
        return body
    operation = ctx.operation
    if operation is not None and (operation.method, operation.path) == ("post", "/v1/vms"):
        if not body.get("memory_slots") and "profile" not in body:
            return {
                **body,
                "memory_slots": [{"slot": 0, "gpa": "0x0", "size": hex(RAM)}],
                "spp": len(str(body.get("name", ""))) % 2 == 0,
            }
        return body
    return folded(body)
