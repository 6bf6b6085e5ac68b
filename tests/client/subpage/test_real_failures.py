"""A service that speaks TLS, whose certificate verifies or does not; and that is killed in the middle of a stream."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import subpage
from subpage import Client
from tests.support.processes import process

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    authority: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """At 127.0.0.1, which is the only name that its certificate has."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    made = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    names = ("-days", "1", "-subj", "/CN=subpage", "-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run([*made, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    with process(SUBPAGE_TLS_CERTIFICATE=str(certificate), SUBPAGE_TLS_KEY=str(key)) as (started, url, _):
        yield Service(started, url, certificate)


def test_a_certificate_that_verifies(guarded: Service) -> None:
    with Client(guarded.url, ca=guarded.authority, patience=60) as client:
        client.ready()
        vm = client.create_vm("guest", memory="16MiB")
        vm.set_subpages(0x10, 0)
        assert vm.replay([{"gpa": 0x10040}]).violations == 1
        with vm.attach(lambda question: "allow"):
            assert vm.access(0x10040, on_violation="ask")["landed"]
        vm.delete()


@pytest.mark.parametrize(
    ("host", "trusted"), [("127.0.0.1", False), ("localhost", True)], ids=["of nobody", "of another name"]
)
def test_a_certificate_that_does_not_verify(guarded: Service, host: str, trusted: bool) -> None:
    url = guarded.url.replace("127.0.0.1", host)
    with (
        Client(url, ca=guarded.authority if trusted else None) as client,
        pytest.raises(subpage.Untrusted, match=r"is not trusted: give the authority .*--ca"),
    ):
        client.version()


def test_a_service_that_speaks_tls_is_no_plain_one(guarded: Service) -> None:
    with (
        Client(guarded.url.replace("https", "http")) as client,
        pytest.raises(subpage.Unreachable, match=r"does not speak HTTP|was lost"),
    ):
        client.version()


def test_the_command_line_tells_it(guarded: Service) -> None:
    typed = [sys.executable, "-m", "service.cli", "vm", "list", "--server", guarded.url]
    refused, served = (
        subprocess.run([*typed, *more], capture_output=True, text=True, timeout=300, check=False)
        for more in ([], ["--ca", str(guarded.authority)])
    )
    assert refused.returncode == 4 and refused.stderr.count("\n") == 1 and "is not trusted" in refused.stderr
    assert served.returncode == 0 and not served.stderr


def test_a_stream_that_breaks_in_the_middle(guarded: Service) -> None:
    """The last one: the service does not outlive it."""
    with Client(guarded.url, ca=guarded.authority) as client:
        vm = client.create_vm("guest", memory="16MiB")
        vm.set_subpages(0x10, 0)
        trace = vm.replay(np.full(100_000, 0x10040, np.uint64))
        with trace.exits() as exits:
            assert next(exits)["gpa"] == "0x10040"
            guarded.process.kill()
            guarded.process.wait()
            with pytest.raises(subpage.StreamBroken, match="broke off"):
                list(exits)
