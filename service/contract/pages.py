"""What people and tools read before they call: the contract, and the page that shows it without the internet."""

from __future__ import annotations

import asyncio
import json
import mimetypes
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from service.contract.documents import openapi_document
from service.http.compression import Kept
from service.http.negotiation import JSON
from service.http.route import Routes

_STATIC = Path(__file__).parent / "static"

# Everything on the page is a file of ours; the pictures in Swagger UI's style sheet are data.
_PAGE_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

_pages = Routes(reads="public")


def install(app: FastAPI) -> None:
    """Serve the document at /openapi.json, and Swagger UI from our own files at /docs."""

    def once() -> dict[str, object]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi_document(app)
        return app.openapi_schema

    app.openapi = once  # type: ignore[method-assign]
    app.state.contract = None
    app.state.contract_lock = asyncio.Lock()
    app.router.routes.extend(_pages.routes)


def _contract(app: FastAPI) -> Kept:
    return Kept(json.dumps(app.openapi(), ensure_ascii=False, separators=(",", ":")).encode(), JSON)


@_pages.get("/openapi.json", include_in_schema=False)
async def contract(request: Request) -> Response:
    state = request.app.state
    async with state.contract_lock:
        if state.contract is None:
            # A second of work: in a thread, and once, however many ask at a time.
            state.contract = await asyncio.to_thread(_contract, request.app)
    kept: Kept = state.contract
    return await kept.reply(request)


@cache
def _files() -> dict[str, Path]:
    """What may be had under /static, by the rest of its URL: nothing else that a path could be made to name."""
    return {path.relative_to(_STATIC).as_posix(): path for path in _STATIC.rglob("*") if path.is_file()}


@cache
def _kept(name: str) -> Kept:
    path = _files()[name]
    media = "text/html" if path.suffix == ".html" else mimetypes.guess_type(path.name)[0] or "text/plain"
    return Kept(path.read_bytes(), media)


async def _file(request: Request, name: str, headers: dict[str, str] | None = None) -> Response:
    if name not in _files():
        raise NotFound("must be one of the files of /docs", field="path", value=name)
    return await (await asyncio.to_thread(_kept, name)).reply(request, headers)


@_pages.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return await _file(request, "docs/index.html", {"Content-Security-Policy": _PAGE_POLICY})


@_pages.get("/static/{folder}/{file}", include_in_schema=False)
async def static(request: Request, folder: str, file: str) -> Response:
    return await _file(request, f"{folder}/{file}")
