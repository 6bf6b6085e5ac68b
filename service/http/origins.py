"""Whose page is calling: browsers say it, and pages of other origins change nothing here.

A page may send a simple POST to anywhere, or open a WebSocket, with no question asked before. Browsers name the page in
``Origin``, and say in ``Sec-Fetch-Site`` how it is related to where the request goes; no page can forge either. What is
no browser sends neither, and is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from service.problems import Forbidden

_RULE = "must be the service's own or one of cors_origins"
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
# The page is the service's own, or there is none: the user did it.
_OWN_SITE = frozenset({b"same-origin", b"none"})


@lru_cache(maxsize=256)
def parsed(origin: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port of a serialised origin, the port also where it is the scheme's own; None for no origin."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if not parts.scheme or not parts.hostname or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, port or _PORTS.get(parts.scheme)


def check_page(origin: bytes | None, site: bytes | None, host: bytes | None, allowed: Sequence[str]) -> None:
    """Refuse what a page of another origin than ``allowed`` sends; the arguments are Origin, Sec-Fetch-Site and Host.

    Behind a proxy that changes Host, browsers that send Sec-Fetch-Site (to https, and to this machine) still tell the
    service's own pages from others; for older ones the proxy has to hand Host on. X-Forwarded-Host is not asked: it is
    whatever the last one says who wrote it. Raises Forbidden.
    """
    if origin is None and site is None:
        return
    given = None if origin is None else origin.decode("latin-1")
    if "*" in allowed or (given is not None and given in allowed):
        return
    if site is not None:
        if site in _OWN_SITE:
            return
        field, value = ("Sec-Fetch-Site", site.decode("latin-1")) if given is None else ("Origin", given)
        raise Forbidden(_RULE, field=field, value=value)
    assert given is not None
    page = parsed(given)
    if page is None or host is None or page != parsed(f"{page[0]}://{host.decode('latin-1')}"):
        raise Forbidden(_RULE, field="Origin", value=given)
