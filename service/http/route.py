"""The routes of the API: each declares who may call it, and refuses query parameters that it does not have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

from fastapi import APIRouter
from fastapi._compat import ModelField
from fastapi.routing import APIRoute, APIWebSocketRoute
from pydantic import BaseModel, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.admission import gated
from service.http.handlers import refused
from service.http.json_bodies import received
from service.http.negotiation import JSON
from service.http.wire_types import integer
from service.problems import InvalidDocument
from service.security.access import Permission

M = TypeVar("M", bound=BaseModel)


class _Id(Convertor[str]):
    """An id in a path that a verb may follow: ``{job:id}:cancel`` is no other spelling of ``{job:id}``."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _Id())

# Several times as many as the call with the most.
_MOST_PARAMETERS = 64

F = TypeVar("F", bound=Callable[..., Any])


def reads_query(endpoint: F) -> F:
    """Mark an endpoint that takes its request alone: it reads the query with ``parse_query``, which is as strict and
    four times as fast, and its body itself. Nothing is left to do for the framework."""
    endpoint.reads_query = True  # type: ignore[attr-defined]
    return endpoint


def permission(needed: Permission) -> Callable[[F], F]:
    """Declare what an endpoint demands of its caller, where that differs from the rest of its module."""

    def declare(endpoint: F) -> F:
        endpoint.permission = needed  # type: ignore[attr-defined]
        return endpoint

    return declare


def query_members(request: HTTPConnection) -> dict[str, str]:
    """The query by name. Raises InvalidDocument for more than a call can have, unread, and for a name given twice."""
    query: bytes = request.scope["query_string"]
    if query.count(b"&") >= _MOST_PARAMETERS:
        raise InvalidDocument(f"must be at most {_MOST_PARAMETERS} parameters", field="query")
    # As the framework does, which makes two more containers of it.
    given = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    members = dict(given)
    if len(members) < len(given):
        repeated = next(name for name, count in Counter(name for name, _ in given).items() if count > 1)
        raise InvalidDocument("must be given once", field=repeated, value=members[repeated])
    return members


def parse_query(model: type[M], request: Request) -> M:
    """The query of ``request`` as a model. Raises InvalidDocument."""
    try:
        return model.model_validate(query_members(request))
    except ValidationError as error:
        raise refused(error, model) from None


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


def _offers(responses: Mapping[int | str, dict[str, Any]]) -> tuple[str, ...]:
    """The media types that the successes among ``responses`` document."""
    found: dict[str, None] = {}
    for status, reply in responses.items():
        if str(status).startswith("2"):
            found |= dict.fromkeys(reply.get("content", {}))
            if "model" in reply:
                found[JSON] = None
    return tuple(found)


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def _with_document(handler: Handler, field: ModelField | None) -> Handler:
    """``handler``, which is given its document parsed within bounds."""
    if field is None:
        return handler
    model = field.field_info.annotation

    async def reading(request: Request) -> Response:
        return await handler(await received(model, request))

    return reading


def _direct(endpoint: Handler) -> ASGIApp:
    """An endpoint that takes its request alone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


def _plain_integers(fields: Sequence[ModelField]) -> frozenset[str]:
    """The parameters that are integers to the framework, and have no parser of ours."""
    return frozenset(
        field.alias
        for field in fields
        if field.field_info.annotation in (int, int | None)
        and not any(hasattr(part, "__get_pydantic_core_schema__") for part in field.field_info.metadata)
    )


def _check_integer(name: str, value: str) -> None:
    """Refuse what the framework takes for a number beside digits: underscores, spaces, signs, digits of any script."""
    if integer(value.removeprefix("-")) is None or "x" in value:
        raise InvalidDocument("must be an integer in decimal digits", field=name, value=value)


class StrictRoute(APIRoute):
    """A route behind its gate. A typing error in an option must not silently run the call with the default."""

    permission: Permission | None
    offers: tuple[str, ...]
    chooses: bool

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.permission = getattr(endpoint, "permission", None)
        self.offers = _offers(self.responses)
        self.chooses = len(self.offers) > 1 or 204 in self.responses
        direct = getattr(endpoint, "reads_query", False)
        self.app = gated(self, _direct(endpoint) if direct else self.app)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = _with_document(super().get_route_handler(), self.body_field)
        known = frozenset(field.alias for field in self.dependant.query_params)
        counts = _plain_integers(self.dependant.query_params)
        numbered = _plain_integers(self.dependant.path_params)

        async def strict(request: Request) -> Response:
            for name in numbered:
                _check_integer(name, request.path_params[name])
            if request.scope["query_string"]:
                for name, value in query_members(request).items():
                    if name not in known:
                        allowed = ", ".join(sorted(known)) or "none"
                        raise InvalidDocument(
                            f"is not a parameter of this call; it has: {allowed}", field=name, value=value
                        )
                    if name in counts:
                        _check_integer(name, value)
            return await handler(request)

        return strict


class GuardedWebSocketRoute(APIWebSocketRoute):
    """A WebSocket behind the same gate: a refusal answers the opening handshake."""

    permission: Permission | None
    offers: tuple[str, ...] = ()
    chooses = False

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.permission = getattr(endpoint, "permission", None)
        self.app = gated(self, self.app)


class HeadRoute(BaseRoute):
    """HEAD of whatever a route reads with GET. The route runs as it does for GET; the server leaves the body out.

    Streams are the exception: what makes one asks for the method, and makes none.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            reading = {**scope, "method": "GET"}
            for route in self._routes:
                if isinstance(route, StrictRoute):
                    match, child = route.matches(reading)
                    if match is Match.FULL:
                        return match, child
        return Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await cast(StrictRoute, scope["route"]).app(scope, receive, send)


class Routes(APIRouter):
    """The routes of one resource.

    ``reads`` is the permission of its GETs, ``writes`` that of everything else, WebSockets included;
    ``@permission(...)`` below the route's decorator overrides them. A route without either is a mistake that a test
    finds, and demands ``admin`` until then.
    """

    def __init__(self, *, reads: Permission | None = None, writes: Permission | None = None, **options: Any) -> None:
        super().__init__(route_class=StrictRoute, **options)
        self._reads, self._writes = reads, writes

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().add_api_route(path, endpoint, **options)
        route = self.routes[-1]
        assert isinstance(route, StrictRoute)
        if route.permission is None:
            route.permission = self._reads if (route.methods or set()) <= {"GET", "HEAD"} else self._writes

    def add_api_websocket_route(
        self, path: str, endpoint: Callable[..., Any], name: str | None = None, **options: Any
    ) -> None:
        route = GuardedWebSocketRoute(self.prefix + path, endpoint, name=name, **options)
        route.permission = route.permission or self._writes
        self.routes.append(route)
