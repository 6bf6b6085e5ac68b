"""Where the examples find a service: at the URL that is given, or in a process that is started for the occasion."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import subpage
from service.cli.demo import DEFAULT_POLICY, DEFAULT_TRACE, service

# A real kernel boot, and what a rootkit would overwrite of it; and the same guest later.
BOOT, POLICY = DEFAULT_TRACE, DEFAULT_POLICY
USER = Path(__file__).resolve().parent.parent / "tests" / "data" / "traces" / "user.parquet"


@contextlib.contextmanager
def connect(url: str | None) -> Iterator[subpage.Client]:
    """A client of a service that is ready, which takes minutes where the engine must be compiled first."""
    with contextlib.ExitStack() as stack:
        found = url or stack.enter_context(service()).url()
        client = stack.enter_context(subpage.Client(found, patience=600))
        client.ready()
        yield client


@contextlib.contextmanager
def guest(client: subpage.Client, **members: Any) -> Iterator[subpage.Vm]:
    """A VM like the recorded guest, deleted in the end."""
    vm = client.create_vm("guest", memory="1GiB", **members)
    try:
        yield vm
    finally:
        vm.delete()
