"""A client for the examples: of the service whose URL is given, or of one that is started for the occasion."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx2

from service.cli.demo import DEFAULT_POLICY, DEFAULT_TRACE, service

# A real kernel boot, and what a rootkit would overwrite of it; and the same guest later.
BOOT, POLICY = DEFAULT_TRACE, DEFAULT_POLICY
USER = Path(__file__).resolve().parent.parent / "tests" / "data" / "traces" / "user.parquet"
PARQUET = "application/vnd.apache.parquet"
ARROW = "application/vnd.apache.arrow.stream"

# The recorded guest has 1 GiB of RAM at 0.
RAM = {"slot": 0, "gpa": "0x0", "size": "0x40000000"}


@contextlib.contextmanager
def connect(url: str | None) -> Iterator[httpx2.Client]:
    """A client that waits as long as a replay takes."""
    with contextlib.ExitStack() as stack:
        if url is None:
            started = stack.enter_context(service())
            client = stack.enter_context(httpx2.Client(base_url=started.url(), timeout=600))
            started.wait_until_ready(client)
        else:
            client = stack.enter_context(httpx2.Client(base_url=url, timeout=600))
        yield client


@contextlib.contextmanager
def guest(client: httpx2.Client, **members: object) -> Iterator[str]:
    """URL of a VM like the recorded guest, deleted in the end."""
    reply = client.post("/v1/vms", json={"memory_slots": [RAM], "spp": True, **members}).raise_for_status()
    home = reply.headers["Location"]
    try:
        yield home
    finally:
        client.delete(home)
