"""Numbers, headers and queries as no client writes them: refused in linear time, never a 500."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import pytest

from service.http.prefer import Preferences, preferences
from service.http.wire_types import decimal, integer
from service.problems import InvalidDocument, describe
from tests.contract.client import ContractClient, contract
from tests.contract.places import url
from tests.support.hostile_numbers import HOSTILE_NUMBERS
from tests.support.server import Running

NUMBERS = (*HOSTILE_NUMBERS, str(1 << 63), "")
# Those that a header can have.
IN_A_HEADER = [value for value in NUMBERS if value.isascii() and value.isprintable() and value == value.strip()]
OPERATIONS = [
    pytest.param(path, method, operation, id=f"{method.upper()} {path}")
    for path, item in contract().document["paths"].items()
    for method, operation in item.items()
]


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_any_number_anywhere(
    path: str, method: str, operation: dict[str, Any], client: ContractClient, vm: str
) -> None:
    """In each place of the path and in each parameter; the checking client refuses what is undocumented, a 500 too."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    options: dict[str, Any] = {"json": body["example"]} if body else {}
    plain = url(path, operation, vm)
    for parameter in operation.get("parameters", []):
        name, place = parameter["name"], parameter["in"]
        if name == "vm" or place == "header":
            continue
        for value in NUMBERS:
            if place == "query":
                separator = "&" if "?" in plain else "?"
                asked = re.sub(rf"(?<=[?&]){name}=[^&]*&?", "", plain) + f"{separator}{name}={quote(value)}"
            else:
                parts = path.split("/")
                given = plain.partition("?")[0].split("/")
                at = next((i for i, part in enumerate(parts) if part == f"{{{name}}}"), None)
                if at is None or not value:
                    continue
                given[at] = quote(value)
                asked = "/".join(given) + "?" + plain.partition("?")[2]
            reply = client.request(method, asked, **options)
            assert reply.status_code < 500, f"{name}={value[:40]}: {reply.text[:300]}"


@pytest.mark.parametrize("value", IN_A_HEADER)
def test_any_number_in_a_header(value: str, client: ContractClient, vm: str) -> None:
    for name in ("Last-Event-ID", "If-None-Match", "Range", "Prefer", "Accept", "Accept-Encoding", "Idempotency-Key"):
        given = {"Prefer": f"wait={value}", "Accept": f"*/*;q={value}", "Accept-Encoding": f"gzip;q={value}"}
        reply = client.get(f"{vm}/events", headers={name: given.get(name, value)})
        assert reply.status_code in (200, 406, 422), f"{name}: {reply.text[:300]}"
        assert client.post(
            f"{vm}/traces", json={"accesses": []}, headers={name: given.get(name, value)}
        ).status_code in (
            201,
            202,
            406,
            422,
        )


def sent(service: Running, head: str) -> int:
    """The status of a request that is sent as it is."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n")
        return int(connection.recv(1 << 16).split(b" ", 2)[1])


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 19, "0" * 5000, "\xb2", "+5", "0x10", "1_0", ""])
def test_content_lengths(value: str, service: Running, vm: str) -> None:
    head = f"PUT {vm}/spp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {value}"
    assert sent(service, head) in (400, 413)


def test_event_ids_that_are_none(service: Running, vm: str) -> None:
    for value in ("9" * 5000, "\xb2", "-1", "0x10", str(1 << 53)):
        assert sent(service, f"GET {vm}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nLast-Event-ID: {value}") == 422


def test_pages_past_the_end_of_the_address_space(client: ContractClient, vm: str) -> None:
    for gfn, npages in ((hex((1 << 64) - 1), 1), (hex(1 << 52), 1), (hex((1 << 52) - 1), 2)):
        reply = client.get(f"{vm}/events", params={"gfn": gfn, "npages": npages})
        assert (reply.status_code, reply.json()["field"]) == (422, "gfn")
    assert client.get(f"{vm}/events", params={"gfn": hex((1 << 52) - 1)}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        '{"gpa": %s}' % ("9" * 5000),
        '{"gpa": 1e400}',
        '{"gpa": NaN}',
        '{"gpa": -Infinity}',
        '{"gpa": "%s"}' % ("9" * 5000),
        '{"gpa": [Infinity, NaN]}',
        '{"gpa": {"a": 1e999}}',
        '{"gpa": 0, "size": 1e400}',
        '{"gpa": 0, "size": %s}' % ("9" * 5000),
        '{"gpa": 0, "vcpu": 1.5}',
    ],
)
def test_numbers_that_json_cannot_mean(text: str, client: ContractClient, vm: str) -> None:
    headers = {"Content-Type": "application/json"}
    for path, body in (("accesses", text), ("traces", f'{{"accesses": [{text}]}}')):
        reply = client.post(f"{vm}/{path}", content=body.encode(), headers=headers)
        assert reply.status_code in (400, 422), reply.text
        assert "Infinity" not in re.sub(r'"(\\.|[^"\\])*"', "", reply.text)


def test_what_is_shown_of_a_value_is_json() -> None:
    for value in ([float("inf")], {"a": float("-inf")}, [float("nan")], float("inf")):
        body, _ = describe(InvalidDocument("is wrong", field="x", value=value), "/")
        assert isinstance(body["value"], str)


def test_one_parser() -> None:
    assert [integer(text) for text in ("0", "007", "0x1F", "18446744073709551616")] == [0, 7, 31, 1 << 64]
    for text in ("", "0x", "-1", "+1", " 1", "1 ", "1\n", "1_0", "²", "٣", "0X1", "9" * 33, "0x" + "f" * 31):
        assert integer(text) is None and decimal(text, most=1 << 99) is None
    assert decimal("10", most=10) == 10 and decimal("11", most=10) is None and decimal("0x1", most=10) is None


def test_preferences_as_they_are_written() -> None:
    assert preferences(['wait="1\\0", respond-async; a="b,c"']) == Preferences(True, 10.0)
    assert preferences(["respond-async,"]) == Preferences(True, None)
    assert preferences(['x="a, respond-async", wait = 5 ;q=1']) == Preferences(False, 5.0)
    assert preferences(["WAIT=3, wait=4"]) == Preferences(False, 3.0)
    for text in (
        "wait",
        "wait=",
        "wait=-1",
        "wait=²",
        "wait=1.5",
        "wait=" + "9" * 5000,
        "respond async",
        '"respond-async"',
    ):
        assert preferences([text]) == Preferences(False, None)


def test_parameters_are_counted_before_they_are_read(service: Running, vm: str) -> None:
    for path in (vm, "/livez", f"{vm}/subpages", "/v1/vms"):
        query = "&".join(f"a{number}" for number in range(10_000))
        assert sent(service, f"GET {path}?{query} HTTP/1.1\r\nHost: 127.0.0.1") == 422
        query = "&".join(["gfn=0"] * 60)
        assert sent(service, f"GET {path}?{query} HTTP/1.1\r\nHost: 127.0.0.1") == 422


# What reads a stranger's text: an expression of `text`, and a piece of which many make the worst of it.
READERS = {
    "prefer": ("preferences([text])", ["a= ", " ", '"', "\\", 'a="', "a=", ",", ";", "=", '"\\', "a;"]),
    "if-none-match": ("_named(text, weak=True)", ['"', 'W/"', "W/", "-gzip", '""', "a"]),
    "accept": ("qualities(text)", ["a/b;q=0,", ";", ",", "=", " ", ";q"]),
    "accept-encoding": ("coding_for.__wrapped__(text)", ["*;q=0,", ";", "gzip,"]),
    "request id": ("_GIVEN_ID.fullmatch(text.encode())", ["a", "~", " "]),
    "key": ("_KEY.fullmatch(text.encode())", ["a", '"', " "]),
    "origin": ("parsed.__wrapped__('http://' + text)", ["a", ":", "[", "@", "//", "."]),
    "token": ("presented(text.encode())", ["sp_", "a", "_", " "]),
    "number": ("integer(text)", ["0", "0x", "9"]),
    "kinds": ("_kinds_or_not(text)", ["violation,", ",", " "]),
    "trace numbers": ("_INTEGER_TEXT.fullmatch(text)", ["0", "0x", "f"]),
    "trace numbers of a column": ("_HEX_TEXTS.fullmatch(text)", ["0x0\n", "0x", "0", "\n"]),
    "trace bytes": ("_BYTES_TEXT.fullmatch(text)", ["a", "00", "0"]),
    "routes": ("find_route(app, '/v1/vms/' + text)", ["/", "a", ":", "a/", "%", "/vcpus/0"]),
}
_PROGRAM = """
import sys, time
from contextlib import suppress
from engine.trace.readers.rows import _BYTES_TEXT, _HEX_TEXTS, _INTEGER_TEXT
from service.api.events.events import _kinds
from service.app import create_app
from service.http.compression import coding_for
from service.http.conditional import _named
from service.http.envelope import _GIVEN_ID
from service.http.idempotency import _KEY
from service.http.negotiation import qualities
from service.http.origins import parsed
from service.http.prefer import preferences
from service.http.wire_types import integer
from service.problems import ServiceError
from service.security.access import *
from service.security.tokens import *
from service.security import tokens
from starlette.routing import Match

def presented(given):
    return tokens._TOKEN.fullmatch(given.decode())

def _kinds_or_not(text):
    with suppress(ServiceError):
        _kinds(text)

app = create_app()

def find_route(app, path):
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
    return [route.matches(dict(scope)) for route in app.routes]

for expression, pieces in %(readers)r:
    code = compile(expression, expression, "eval")
    for piece in pieces:
        for ends in ("@", '"'):
            # Two heads: what takes half a minute for one, because it is quadratic, takes two for both.
            text = piece * ((1 << 17) // len(piece)) + ends
            eval(code)
print("read")
"""


def test_readers_take_linear_time() -> None:
    """All of it takes seconds; what is quadratic takes minutes for one of them, and is killed."""
    program = _PROGRAM % {"readers": list(READERS.values())}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "read", done.stderr[-2000:]
