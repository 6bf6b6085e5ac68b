"""``GET /``: the console for people, a list of addresses for programs; and the console's files.

All that the console shows comes from the public API, which it calls as any client does. Its files say nothing of
what the service holds: they are for everybody, as the page that signs people in has to be.
"""

from __future__ import annotations

import json
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from service import __version__
from service.http.negotiation import JSON, preferred
from service.http.route import Routes
from service.http.static_files import StaticFiles

_HTML = "text/html"
# JSON first: it is for whoever does not say what they would like. Browsers say text/html.
_OFFERS = (JSON, _HTML)

# Every script and style is a file of ours. Scripts of the page may set styles of elements one by one (CSSOM), which no
# policy forbids; nothing turns text into markup, which trusted types see to.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)

_DATA = Path(__file__).parents[1] / "data"
FILES = StaticFiles(
    Path(__file__).parent / "static",
    # What `subpage demo` replays: the console does the same in the browser.
    {
        "samples/boot.parquet": _DATA / "traces" / "boot.parquet",
        "samples/kernel_control_data.json": _DATA / "policies" / "kernel_control_data.json",
    },
)

INDEX = {
    "service": "subpage",
    "version": __version__,
    "about": "Sub-page write protection (EPT, SPP) for virtual machines, without the hardware.",
    "vms": "/v1/vms",
    "jobs": "/v1/jobs",
    "capabilities": "/v1/capabilities",
    "problems": "/problems",
    "live": "/livez",
    "ready": "/readyz",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
    "docs": "/docs",
    "console": "/",
}

routes = Routes(reads="public")


@routes.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    if preferred(request, _OFFERS) == JSON:
        return Response(json.dumps(INDEX, indent=2) + "\n", media_type=JSON, headers={"Vary": "Accept"})
    told = {"Content-Security-Policy": PAGE_POLICY, "Vary": "Accept, Accept-Encoding"}
    return await FILES.reply(request, "index.html", told)


@routes.get("/console/{path:path}", include_in_schema=False)
async def file(request: Request, path: str) -> Response:
    return await FILES.reply(request, path)
