"""Requests of every operation of the contract with values that no client means: numbers, texts, headers, paths, bodies.

Each begins as the example of its operation; up to three of its parameters, headers and members of its body are then
replaced from the menus below. Each reply is held to the contract, as far as HTTP let the request through.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote_from_bytes, unquote

import httpx2

from tests.abuse.process import PATIENCE, Service
from tests.contract.client import PROBLEM, contract
from tests.contract.places import url
from tests.support.http import new_vm
from tests.support.waiting import until

NUMBERS = [
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"-1", b"-0", b"-" + b"9" * 25, b"1e400", b"1E-400", b"0.1", b"nan", b"NaN"),
    *(b"Infinity", b"-Infinity", b"0x", b"0X1", b"+5", b"1_0", b" 1", b"1 ", b"1;q=2", b"", b"007", b"0b1"),
    *(b"%d" % ((1 << bits) + more) for bits in (31, 32, 52, 63, 64, 128) for more in (-1, 0, 1)),
    *("\N{SUPERSCRIPT TWO}".encode(), "٣".encode(), "𝟜".encode(), b"\xb2"),  # noqa: RUF001
]
TEXTS = [
    *(
        b"\x00",
        b"a\x00b",
        b"\r\n",
        b"\x1b[2K",
        b"\x7f",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        "\u2028\u202e".encode(),
    ),
    *(
        b"../../etc/passwd",
        b"..",
        b".",
        b"/",
        b"//",
        b"\\",
        b"%",
        b"%00",
        b"{}",
        b"$(id)",
        b"' OR 1=1 --",
        b"a" * 60_000,
    ),
    *(b"true", b"null", b"*", b'"', b"," * 5000, b'"\\' * 3000, b"=" * 5000, b"a,b,c", b"\xf0\x9f\x92\xa9" * 2000),
]
# As they stand in a document, whether JSON or not.
MEMBERS = [
    *(number for number in NUMBERS if number),
    *(b'"' + number + b'"' for number in NUMBERS),
    *(json.dumps(text.decode("latin-1")).encode() for text in TEXTS),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\x00"', b'"\\u0000"', b'"\\x"', b'"'),
    *(b"null", b"true", b"[]", b"{}", b"[[]]", b"[null]", b'{"a":1,"a":2}', b'{"":{}}', b"", b"//", b"undefined"),
    *(b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[" * 100_000, b"[" + b"0," * 20_000 + b"0]"),
    b"{" + b",".join(b'"k%d":0' % number for number in range(5000)) + b"}",
]
HEADERS = (
    *("Accept", "Accept-Encoding", "Accept-Language", "Authorization", "Content-Type", "Content-Encoding", "Cookie"),
    *("Expect", "Forwarded", "Host", "Idempotency-Key", "If-Match", "If-None-Match", "If-Modified-Since", "If-Range"),
    *("Last-Event-ID", "Origin", "Prefer", "Range", "Referer", "Sec-Fetch-Site", "traceparent", "Upgrade"),
    *("X-Forwarded-For", "X-Forwarded-Host", "X-HTTP-Method-Override", "X-Request-Id", "a" * 5000),
)
_BEGINNINGS = (b"", b"wait=", b"bytes=", b'"', b"W/", b"*/*;q=", b"gzip;q=", b"application/", b"Bearer ", b"00-")
_MARK = "\ue000hostile\ue000"
_NONE = "vm_0000000000000000"  # its place is taken by the machine that there is
# What HTTP says of a head before there is an operation.
_OF_HTTP = {400, 403, 404, 405, 408, 413, 415, 417, 421, 431}


@dataclass
class Request:
    """One, as it is sent. ``hostile`` says what was put where."""

    method: str
    target: bytes
    headers: list[tuple[str, bytes]]
    body: bytes
    hostile: list[str] = field(default_factory=list)

    def head(self) -> bytes:
        lines = [f"{self.method} ".encode() + self.target + b" HTTP/1.1"]
        lines += [name.encode() + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"Content-Length: %d" % len(self.body), b"", b""])


def _places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every member and item of a document, and the document."""
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in items:
        yield from _places(member, (*where, name))


def _body(rng: random.Random, example: Any) -> tuple[bytes, str]:
    """A document with one member that is hostile: its value, or one more."""
    document = copy.deepcopy(example)
    member = rng.choice(MEMBERS)
    where = rng.choice(list(_places(document)))
    told = f"body {list(where)}: {member[:40]!r}"
    if not where:
        return member, told
    inner = document
    for name in where[:-1]:
        inner = inner[name]
    if isinstance(inner, dict) and rng.random() < 0.1:
        inner[rng.choice(["", "a" * 5000, "\x00", "__proto__", "\ud800"])] = _MARK
    else:
        inner[where[-1]] = _MARK
    return json.dumps(document).encode().replace(json.dumps(_MARK).encode(), member), told


def requests(seed: int, token: str) -> Iterator[Request]:
    """Without end: each operation once, in order, then again."""
    rng = random.Random(seed)
    document = contract().document
    operations = [
        (path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    while True:
        for path, method, operation in operations:
            yield _request(rng, path, method, operation, token)


def _request(rng: random.Random, path: str, method: str, operation: dict[str, Any], token: str) -> Request:
    plain, _, query = url(path, operation, _NONE).partition("?")
    parts = [part.encode() for part in plain.split("/")]
    asked = [part.encode().partition(b"=")[::2] for part in query.split("&") if part]
    given = {"Host": b"127.0.0.1", "Authorization": b"Bearer " + token.encode()}
    content = operation.get("requestBody", {}).get("content", {})
    body, made = b"", Request(method.upper(), b"", [], b"")
    if content:
        media = rng.choice(list(content))
        given["Content-Type"] = media.encode()
        body = json.dumps(content[media].get("example")).encode() if media == "application/json" else rng.randbytes(64)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = rng.choice(NUMBERS) if rng.random() < 0.6 else rng.choice(TEXTS)
        match rng.randrange(4):
            case 0 if "{" in path:
                # Not the machine more often than not: there would be nothing to do.
                inner = [at for at, part in enumerate(path.split("/")) if "{" in part]
                at = inner[-1] if len(inner) > 1 and rng.random() < 0.9 else inner[0]
                parts[at] = value[:7000] if rng.random() < 0.9 else value
                made.hostile.append(f"part {at} of the path: {value[:40]!r}")
            case 1:
                names = [item["name"].encode() for item in operation.get("parameters", []) if item["in"] == "query"]
                name = rng.choice([*names, *names, *names, b"unknown", value[:50]])
                asked = [pair for pair in asked if pair[0] != name] if rng.random() < 0.9 else asked
                asked += [(name, value)] * rng.choice((1, 1, 1, 2, 50))
                made.hostile.append(f"{name!r} of the query: {value[:40]!r}")
            case 2:
                own = [item["name"] for item in operation.get("parameters", []) if item["in"] == "header"]
                name = rng.choice([*HEADERS, *own, *own])
                given[name] = (rng.choice(_BEGINNINGS) + value).replace(b"\r\n", b" ")
                made.hostile.append(f"header {name[:40]}: {given[name][:40]!r}")
            case _ if content and given["Content-Type"] == b"application/json":
                body, told = _body(rng, content["application/json"].get("example"))
                made.hostile.append(told)
            case _ if rng.random() < 0.1:
                body = rng.choice(MEMBERS)
                made.hostile.append(f"body {body[:40]!r}")
    made.target = b"/".join(quote_from_bytes(part, safe=b"").encode() for part in parts)
    if asked:
        made.target += b"?" + b"&".join(
            quote_from_bytes(name).encode() + b"=" + quote_from_bytes(value[:20_000]).encode() for name, value in asked
        )
    if rng.random() < 0.02:
        made.target += rng.choice([b"\x00", b"\xff", b"%", b"%zz", b"#a", b"?", b";", b"/", b"//", b"%2f..%2f", b"\\"])
        made.hostile.append(f"the target ends in {made.target[-6:]!r}")
    made.headers, made.body = list(given.items()), body
    return made


class Attacker:
    """Sends requests on one connection after the other, and holds the replies to the contract."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._connection: socket.socket | None = None
        self.statuses: Counter[int] = Counter()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def send(self, request: Request) -> None:
        """Raises what is wrong with the reply."""
        what = f"{request.method} {request.target[:200]!r}: {'; '.join(request.hostile)}"
        try:
            self._send(request)
        except Exception as error:
            error.add_note(what)
            raise

    def _send(self, request: Request) -> None:
        if self._connection is None:
            self._connection = self._service.connect()
            self._connection.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent; the reply is there
            self._connection.sendall(request.head() + request.body)
        reply = http.client.HTTPResponse(self._connection, method=request.method)
        reply.begin()
        self.statuses[reply.status] += 1
        media = (reply.getheader("Content-Type") or "").partition(";")[0]
        endless = media == "text/event-stream" or b"follow" in request.target
        content = b"" if endless else reply.read()
        if endless or reply.will_close or reply.status in (101, 413):
            self.close()
        assert reply.status < 500 or (reply.status, media) == (503, PROBLEM), content[:500]
        self._check(request, reply, content, endless)

    def _check(self, request: Request, reply: http.client.HTTPResponse, content: bytes, endless: bool) -> None:
        given = httpx2.Headers([(name, value) for name, value in reply.getheaders()])
        if "content-encoding" in given or endless:
            return
        if reply.status in _OF_HTTP:
            assert given["content-type"] == PROBLEM or request.method == "HEAD"
            assert json.loads(content)["status"] == reply.status
            return
        asked = httpx2.Request(request.method, "http://127.0.0.1/")
        response = httpx2.Response(reply.status, headers=given, content=content, request=asked)
        # A client's library would make another path of some.
        path = unquote(re.split(b"[?#]", request.target)[0].decode("latin-1"), errors="replace")
        operation, _ = contract().operation(request.method, path)
        assert operation is not None, f"{reply.status} of no operation"
        contract()._check_reply(operation, response, f"{request.method} → {reply.status}")


def attack(service: Service, *, seed: int, count: int = 1 << 60, seconds: float = 1e9) -> Counter[int]:
    """So many requests, or for so long, at a machine of its own; how often each status came."""
    token = service.token("mallory", "admin")[1]
    end, attacker, vm = time.monotonic() + seconds, Attacker(service), _NONE
    with contextlib.closing(attacker), service.client(token) as client:
        until(lambda: client.get("/v1/vms").status_code == 200)
        for number, request in enumerate(requests(seed, token)):
            if number == count or time.monotonic() >= end:
                break
            if number % 50 == 0 or client.get(vm).status_code != 200:
                # It may have been deleted, and others made.
                for item in client.get("/v1/vms").json()["vms"]:
                    client.delete(f"/v1/vms/{item['id']}")
                vm = new_vm(client)
            request.target = request.target.replace(_NONE.encode(), vm.rpartition("/")[2].encode())
            try:
                attacker.send(request)
            except Exception as error:
                error.add_note(f"request {number} of seed {seed}")
                raise
    return attacker.statuses
