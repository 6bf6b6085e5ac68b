"""Heads and bodies without end."""

from __future__ import annotations

from tests.abuse.process import TOKEN, head

CHUNKED = "Transfer-Encoding: chunked"

# What is sent at first, then over and over; the status and the code that end it.
WITHOUT_END = {
    "trailers of a stranger": (head("POST", "/v1/vms", None, CHUNKED) + b"0\r\n", b"a: b\r\n" * 8000, b" 4"),
    "trailers": (head("POST", "/v1/vms", TOKEN, CHUNKED) + b"0\r\n", b"a: b\r\n" * 8000, b"431"),
    "one trailer": (head("POST", "/v1/vms", TOKEN, CHUNKED) + b"0\r\na: ", b"b" * 40000, b"431"),
    "one field": (b"GET /livez HTTP/1.1\r\na: ", b"b" * 40000, b"431"),
    "many fields": (b"GET /livez HTTP/1.1\r\n", b"a:\r\n" * 8000, b"431"),
    "one URL": (b"GET /", b"b" * 40000, b"431"),
    "one extension": (head("POST", "/v1/vms", TOKEN, CHUNKED) + b"1;a=", b"b" * 40000, b"431"),
    "chunks of a byte": (head("POST", "/v1/vms", TOKEN, CHUNKED), b"1\r\na\r\n" * 8000, b"400"),
    "chunks nobody asked for": (head("GET", "/livez", None, CHUNKED), b"1\r\na\r\n" * 8000, b" "),
    "a body nobody reads": (head("GET", "/livez", None, CHUNKED), b"8000\r\n" + b"x" * 0x8000 + b"\r\n", b"200"),
    "a body of a stranger": (head("POST", "/v1/vms", None, CHUNKED), b"8000\r\n" + b"x" * 0x8000 + b"\r\n", b"401"),
}
