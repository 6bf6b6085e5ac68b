"""The machine of a request that was let in: found by its id and its tenant, read from the store if it is not here.

Nothing of a machine is looked at before the caller is known: to a stranger, and to another tenant, the id of a machine
that waits in the store is one that never was, in the reply and in the time and the memory that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import NotReady
from service.runtime.registry import Registry
from service.security.access import Principal

API = "/v1/"


def check_open(registry: Registry) -> None:
    """Raise NotReady while it is not known which machines there are."""
    if not registry.repository.open:
        raise NotReady(registry.repository.trouble)


def with_machine(app: ASGIApp) -> ASGIApp:
    """``app``, the inside of a route whose path names a machine: the caller's machine of that name is in memory when
    it runs, and stays so until its end.

    A machine that does not exist, or is another tenant's, is the route's to report. Raises StoreUnavailable.
    """

    async def loaded(scope: Scope, receive: Receive, send: Send) -> None:
        registry: Registry = scope["app"].state.registry
        if not registry.repository.durable:
            await app(scope, receive, send)  # all of them are here
            return
        principal: Principal = scope["principal"]
        parameters: Mapping[str, Any] = scope["path_params"]
        async with registry.using(parameters["vm"], principal.tenant):
            await app(scope, receive, send)

    return loaded
