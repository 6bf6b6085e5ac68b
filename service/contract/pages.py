"""What people and tools read before they call: the contract, and the page that shows it without the internet."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.contract.documents import openapi_document
from service.http.compression import Kept
from service.http.negotiation import JSON
from service.http.route import Routes
from service.http.static_files import StaticFiles

_FILES = StaticFiles(Path(__file__).parent / "static")

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


@_pages.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return await _FILES.reply(request, "docs/index.html", {"Content-Security-Policy": _PAGE_POLICY})


@_pages.get("/static/{folder}/{file}", include_in_schema=False)
async def static(request: Request, folder: str, file: str) -> Response:
    return await _FILES.reply(request, f"{folder}/{file}")
