"""The route class of the API: query parameters that a call does not have are refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from service.http.handlers import refusal
from service.problems import InvalidDocument

M = TypeVar("M", bound=BaseModel)


F = TypeVar("F", bound=Callable[..., Any])


def reads_query(endpoint: F) -> F:
    """Mark an endpoint that reads its query with ``parse_query``, which is as strict and four times as fast."""
    endpoint.reads_query = True  # type: ignore[attr-defined]
    return endpoint


def parse_query(model: type[M], request: Request) -> M:
    """The query of ``request`` as a model. Raises InvalidDocument."""
    given = request.query_params.multi_items()
    members = dict(given)
    if len(members) < len(given):
        repeated = next(name for position, (name, _) in enumerate(given) if name in dict(given[:position]))
        raise InvalidDocument("must be given once", field=repeated, value=members[repeated])
    try:
        return model.model_validate(members)
    except ValidationError as error:
        raise refusal(error.errors()) from None


def query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """The OpenAPI of the parameters that ``parse_query(model, …)`` reads."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": member.pop("description", ""),
            "schema": member,
        }
        for name, member in schema["properties"].items()
    ]


class StrictRoute(APIRoute):
    """A typing error in an option must not silently run the call with the default."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if getattr(self.endpoint, "reads_query", False):
            return handler
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
