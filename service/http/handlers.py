"""From exceptions to problem+json responses, for our errors and for the framework's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from engine.symbols.formats import told
from service.http.members import members_at, shortened
from service.problems import (
    MEDIA_TYPE,
    FieldError,
    InvalidDocument,
    ServiceError,
    UnsupportedMediaType,
    describe,
    showable,
)

logger = logging.getLogger("subpage")

# Faults of one request beyond which they are counted and not listed.
_LISTED_FAULTS = 1000

_PLACES = ("body", "query", "path", "header", "cookie")


def problem_response(request: HTTPConnection, exc: Exception) -> Response:
    """The answer to ``exc``."""
    body, headers = describe(exc, request.url.path)
    # ASCII only: a value quoted from the request may hold lone surrogates, which UTF-8 cannot carry.
    content = json.dumps(body, ensure_ascii=True).encode()
    return Response(content, status_code=body["status"], media_type=MEDIA_TYPE, headers=headers)


def _inside(location: Sequence[str | int]) -> Sequence[str | int]:
    """The steps into the document, without the part of the request that it is."""
    return location[1:] if location and location[0] in _PLACES else location


def field_name(location: Sequence[str | int]) -> str | None:
    """``("body", "ranges", 2, "gfn")`` as ``ranges[2].gfn``."""
    name = ""
    for step in _inside(location):
        if isinstance(step, int):
            name += f"[{step}]"
        elif not step.startswith("("):  # a tag that names the branch of a union, not a member
            name += f".{step}"
    return name.lstrip(".") or (str(location[0]) if location else None)


def refusal(faults: Sequence[Mapping[str, Any]], model: Any = None) -> ServiceError:
    """One refusal out of the faults that pydantic found in a document of type ``model``."""
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return ServiceError(f"the body must be JSON: {reason}", code="malformed-body")
    listed: list[FieldError] = []
    for fault in faults[:100]:
        field = field_name(fault["loc"])
        # A member that is missing has no value; pydantic reports the document that lacks it.
        value = None if fault["type"] == "missing" else showable(fault.get("input"), field)
        listed.append(FieldError(field=field, value=value, rule=_rule(fault, model)))
    return InvalidDocument(listed[0].rule, field=listed[0].field, value=listed[0].value, faults=listed)


def refused(error: ValidationError, model: Any = None, place: str | None = None) -> ServiceError:
    """The refusal that ``error`` is; ``place`` names what has no member, such as a body that is no object."""
    if error.error_count() > _LISTED_FAULTS:
        # Listing them would take as long as they are many.
        rule = f"breaks the rules of this document in {error.error_count()} places"
        return InvalidDocument(rule, field=place)
    faults = error.errors(include_url=False)
    return refusal([{**fault, "loc": (place, *fault["loc"])} for fault in faults] if place else faults, model)


def _rule(fault: Mapping[str, Any], model: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = members_at(model, _inside(fault["loc"])[:-1])
        return "is not a member of this document" + (f", which has: {shortened(known)}" if known else "")
    if fault["type"] == "missing":
        return "is required"
    message = str(fault["msg"]).replace("Input should", "must")
    return message[:1].lower() + message[1:]


def symbols_told(content: bytes) -> str | None:
    """What to do with a file of symbols, to be said behind what was expected; None where it is none."""
    found = told(content)
    return found and (
        f", and this is {found}: POST it to `…/symbols` of the machine and name objects by `symbol`, or let "
        "`subpage policy from-symbols FILE --object NAME` make a policy of it"
    )


async def _on_validation(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    faults = exc.errors()
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    about_body = any(fault["loc"] and fault["loc"][0] == "body" for fault in faults)
    if about_body and isinstance(exc.body, bytes) and media != "application/json":
        # The framework leaves a body of another type undecoded and then reports bytes where a document should be.
        rule = f"must be application/json{symbols_told(exc.body) or ''}"
        given = request.headers.get("content-type", "")
        unsupported = UnsupportedMediaType(
            rule, field="Content-Type", value=given, headers={"Accept": "application/json"}
        )
        return problem_response(request, unsupported)
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    return problem_response(request, refusal(faults, model))


async def _on_refusal(request: Request, exc: Exception) -> Response:
    response = problem_response(request, exc)
    if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = ", ".join(_methods(request))
    return response


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """What answers where there is no route, an opening of a WebSocket included."""
    await problem_response(HTTPConnection(scope), HTTPException(HTTPStatus.NOT_FOUND))(scope, receive, send)


def _methods(request: Request) -> list[str]:
    """The methods of the path, which several routes may share; the framework knows those of one of them."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found | {"HEAD"} if "GET" in found else found)


async def _on_disconnect(request: Request, exc: Exception) -> Response:
    # Nobody is left to read an answer; 499 is what proxies log for it.
    logger.info("client went away: %s %s", request.method, request.url.path)
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem. Unexpected ones are re-raised by the framework and so logged."""
    app.add_exception_handler(EngineError, _on_refusal)
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_refusal)
