"""The route class of the API: query parameters that a call does not have are refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from service.problems import InvalidDocument


class StrictRoute(APIRoute):
    """A typing error in an option must not silently run the call with the default."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        known = frozenset(field.alias for field in self.dependant.query_params)

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                given = request.query_params.multi_items()
                names = [name for name, _ in given]
                for position, (name, value) in enumerate(given):
                    if name not in known:
                        allowed = ", ".join(sorted(known)) or "none"
                        raise InvalidDocument(
                            f"is not a parameter of this call; it has: {allowed}", field=name, value=value
                        )
                    if name in names[:position]:
                        raise InvalidDocument("must be given once", field=name, value=value)
            return await handler(request)

        return strict
