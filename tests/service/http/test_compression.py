"""Coded replies: which are coded, that they are the same, and what their tags are good for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable

import httpx2
import pytest
import zstandard

from service.http.compression import SMALLEST, coding_for
from service.http.conditional import variant
from tests.contract.client import ContractClient
from tests.support.server import Running

UNCODE = {"gzip": lambda coded: zlib.decompress(coded, 31), "zstd": zstandard.decompress}


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("GZip, deflate", "gzip"),
        ("gzip, zstd", "zstd"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("zstd;q=0.5, gzip", "gzip"),
        ("zstd;q=0.5, gzip;q=0.501", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0.0, *", "zstd"),
        ("*", "zstd"),
        ("*;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("gzip;q=nan", None),
        ("gzip;q=1e400", None),
        ("gzip;q=" + "9" * 5000, None),
        ("gzip;q=-1", None),
        ("gzip;q=²", None),
        (";;,,;q", None),
    ],
)
def test_which_coding(accepted: str, coding: str | None) -> None:
    assert coding_for(accepted) == coding


@pytest.fixture
def big(client: ContractClient, vm: str) -> str:
    """The URL of exit records that are worth a coding."""
    client.put(f"{vm}/subpages", params={"gfn": 1, "npages": 1}, json={"access": [0]})
    reply = client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0x1000 + 8 * at} for at in range(300)]})
    return f"{reply.headers['Location']}/exits"


def raw(service: Running, path: str, **headers: str) -> tuple[httpx2.Response, bytes]:
    """A reply and its body as it came."""
    with httpx2.stream("GET", service.url + path, headers=headers, timeout=60) as reply:
        return reply, b"".join(reply.iter_raw())


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_large_replies_are_coded(coding: str, service: Running, big: str) -> None:
    plain, content = raw(service, big, **{"Accept-Encoding": "identity"})
    coded, sent = raw(service, big, **{"Accept-Encoding": coding})
    assert "Content-Encoding" not in plain.headers and coded.headers["Content-Encoding"] == coding
    assert plain.headers["Vary"] == coded.headers["Vary"] == "Accept, Accept-Encoding"
    assert int(coded.headers["Content-Length"]) == len(sent) < len(content) / 5
    assert UNCODE[coding](sent) == content and json.loads(content)["exit_records"]
    head = httpx2.head(service.url + big, headers={"Accept-Encoding": coding}, timeout=60)
    assert head.headers["Content-Length"] == coded.headers["Content-Length"] and not head.content


def test_what_is_not_coded(service: Running, client: ContractClient, vm: str, big: str) -> None:
    wanted = {"Accept-Encoding": "gzip, zstd"}
    small = client.get(vm, headers=wanted)
    assert len(small.content) < SMALLEST and "Content-Encoding" not in small.headers and "Vary" not in small.headers
    octets = client.get(f"{vm}/memory", params={"gpa": 0, "size": 1 << 16}, headers=wanted)
    assert len(octets.content) == 1 << 16 and "Content-Encoding" not in octets.headers
    for media in ("application/x-ndjson", "application/vnd.apache.arrow.stream"):
        stream = client.get(big, headers=wanted | {"Accept": media})
        assert "Content-Encoding" not in stream.headers and stream.headers["Vary"] == "Accept"


def test_tags_of_coded_replies(service: Running, client: ContractClient, make_vm: Callable[..., str]) -> None:
    """Another representation has another strong tag; both stand for the same state."""
    leaves = [{"function": number, "eax": number} for number in range(200)]
    vm = make_vm(vcpus=[{"id": 0, "cpuid": leaves}], require_match=True)
    plain = client.get(vm, headers={"Accept-Encoding": "identity"}).headers["ETag"]
    for coding in ("gzip", "zstd"):
        wanted = {"Accept-Encoding": coding}
        tag = raw(service, vm, **wanted)[0].headers["ETag"]
        assert tag == variant(plain, coding) != plain and not tag.startswith("W/")
        for known in (tag, plain):
            again = client.get(vm, headers=wanted | {"If-None-Match": known})
            assert (again.status_code, again.headers["ETag"]) == (304, known)
        # What was read in a coding may be changed.
        refused = client.patch(
            f"{vm}/subpages", json={"ranges": [{"gfn": 0, "access": 0}]}, headers={"If-Match": '"x"'}
        )
        assert refused.status_code == 412
        done = client.patch(f"{vm}/subpages", json={"ranges": [{"gfn": 0, "access": 0}]}, headers={"If-Match": tag})
        assert done.status_code == 204
        plain = client.get(vm, headers={"Accept-Encoding": "identity"}).headers["ETag"]


@pytest.mark.parametrize("path", ["/openapi.json", "/static/swagger-ui/swagger-ui-bundle.js"])
def test_documents_are_coded_once(path: str, service: Running) -> None:
    plain, content = raw(service, path, **{"Accept-Encoding": "identity"})
    for coding, uncode in UNCODE.items():
        coded, sent = raw(service, path, **{"Accept-Encoding": coding})
        assert coded.headers["Content-Encoding"] == coding and uncode(sent) == content
        assert coded.headers["Vary"] == plain.headers["Vary"] == "Accept-Encoding"
        assert len(sent) < (100_000 if path == "/openapi.json" else 500_000)
        again, nothing = raw(service, path, **{"Accept-Encoding": coding, "If-None-Match": coded.headers["ETag"]})
        assert (again.status_code, nothing) == (304, b"") and again.headers["ETag"] == coded.headers["ETag"]


@pytest.mark.parametrize("path", ["/static/swagger-ui/..%2f..%2fapp.py", "/static//app.py", "/static/docs/", "/static"])
def test_only_files_of_the_page_are_served(path: str, service: Running) -> None:
    assert httpx2.get(service.url + path).status_code == 404
