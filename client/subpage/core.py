"""One service: how every call is made, tried again, bounded, and what is asked of a service first."""

from __future__ import annotations

import difflib
import json as jsonlib
import random
import time
import uuid
import warnings
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from subpage.errors import BadInput, Error, NotSubpage, Problem, Unreachable, VersionMismatch, refusal
from subpage.html import Document
from subpage.routes import ROUTES, VERSION, Route
from subpage.transports import Transport, lines
from subpage.wire import Pieces, Reply, Request

JSON = "application/json"
# Refusals that pass by themselves: another change of the machine, a start, too many requests a second.
PASSING = frozenset({"vm-busy", "not-ready", "rate-limited", "idempotency-in-progress", "store-unavailable"})
# Seconds between attempts, and the longest that a service may ask for.
DELAYS = (0.1, 0.2, 0.5, 1.0, 2.0)
LONGEST_DELAY = 30.0
_CONTRACT_BYTES, _REFUSAL_BYTES = 16 << 20, 1 << 20
_TOLD: set[tuple[str, str]] = set()  # services whose other version was told of


class Core:
    """What the objects of one client share."""

    def __init__(
        self, url: str, token: str | None, transport: Transport, *, timeout: float, patience: float, most_bytes: int
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise BadInput(f"{url!r}: must be a URL such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.transport = transport
        self.timeout, self.patience, self.most_bytes = timeout, patience, most_bytes
        self.headers = {"Accept": JSON, "Accept-Encoding": "identity", "User-Agent": f"subpage-client/{VERSION}"}
        if token is not None:
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise BadInput("a token has printable ASCII characters, and the one that was given has none or others")
            self.headers["Authorization"] = f"Bearer {token}"
        self.met: dict[str, Any] | None = None
        self._routes: Mapping[str, Route] = ROUTES

    async def call(self, operation: str, *, again: bool = True, **options: Any) -> Reply:
        """The reply to an operation of the contract; ``options`` are those of ``request``.
        ``again``: the body can be sent a second time."""
        request = await self.request(operation, **options)
        again = again and self.patience > 0
        keyed = request.method != "POST"  # as often as you like: the same in the end
        if again and not keyed:
            request.headers.setdefault("Idempotency-Key", uuid.uuid4().hex)
        deadline, failures = time.monotonic() + self.patience, 0
        uncertain: Unreachable | None = None
        while True:
            failed: Error
            try:
                reply = await self.transport.send(request, self.most_bytes)
            except Unreachable as error:
                failed, wait = error, None
                uncertain = uncertain or (None if error.unsent else error)
            else:
                if 300 <= reply.status < 400 and reply.status != 304:
                    where = reply.headers.get("location", "")[:200]
                    raise NotSubpage(f"{self.url} leads elsewhere ({where}): give the URL of the service itself")
                if reply.status < 400 or (uncertain and request.method == "DELETE" and reply.status == 404):
                    return reply
                if uncertain and reply.status == 412:
                    raise uncertain  # it may have been what was done before that is there now
                failed = refusal(self.url, reply.status, reply.headers, reply.content)
                if not isinstance(failed, Problem) or failed.code not in PASSING or failed.resume_at is not None:
                    raise failed
                wait = failed.retry_after
            pause = min(LONGEST_DELAY, wait or DELAYS[min(failures, len(DELAYS) - 1)] * random.uniform(0.8, 1.2))
            if not again or time.monotonic() + pause > deadline:
                raise failed
            failures += 1
            await self.transport.sleep(pause)

    async def document(self, operation: str, **options: Any) -> Document:
        """The document that an operation answers; an empty one where that is none."""
        found = (await self.call(operation, **options)).json()
        if not isinstance(found, dict) and found is not None:
            raise NotSubpage(f"{self.url} answers {operation}, and not as Subpage does")
        return Document(found or {})

    async def request(
        self,
        operation: str,
        *,
        path: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | Pieces | None = None,
        headers: Mapping[str, str] | None = None,
        patience: float | None = -1.0,
    ) -> Request:
        """An operation as a request; ``patience`` -1: that of the client. Raises BadInput for what it does not have."""
        if self.met is None and operation != "getVersion":
            await self.meet()
        route = self._routes.get(operation) or await self._route(operation)
        url = self.url + filled(operation, route.path, path or {})
        if query and (given := {name: _word(value) for name, value in query.items() if value is not None}):
            url = f"{url}?{urlencode(given)}"
        merged = {**self.headers, **headers} if headers else dict(self.headers)
        if json is not None:
            try:
                content = jsonlib.dumps(json, separators=(",", ":"), default=_plain).encode()
            except (TypeError, ValueError) as error:
                raise BadInput(f"{operation}: the document cannot be written as JSON: {error}") from None
            merged.setdefault("Content-Type", JSON)
        return Request(route.method, url, merged, content, self.timeout if patience == -1.0 else patience)

    async def lines(self, operation: str, **options: Any) -> AsyncGenerator[bytes, None]:
        """The lines of a streamed reply. Raises StreamBroken where it ends in the middle."""
        opened = await self.transport.open(await self.request(operation, **options))
        try:
            if opened.status >= 400:
                raise refusal(self.url, opened.status, opened.headers, await opened.rest(_REFUSAL_BYTES))
            async for line in lines(opened):
                yield line
        finally:
            await opened.close()

    async def pages(self, operation: str, member: str, of: Any = Document, **options: Any) -> AsyncGenerator[Any, None]:
        """The items of a list that comes in pages, each as what ``of`` makes of it."""
        query = dict(options.pop("query", None) or {})
        while True:
            page = await self.document(operation, query=query, **options)
            items = page.get(member)
            if not isinstance(items, list):
                raise NotSubpage(f"{self.url} answers {operation} without {member!r}: it is not Subpage's contract")
            for item in items:
                yield of(item)
            following = dict(parse_qsl(urlsplit(str(page.get("next") or "")).query))
            if not following:
                return
            if following == query:
                raise NotSubpage(f"{self.url}: the next page of {operation} is the same again")
            query = following

    async def _get(self, path: str, most: int) -> Reply:
        return await self.transport.send(Request("GET", self.url + path, dict(self.headers), None, self.timeout), most)

    async def meet(self) -> dict[str, Any]:
        """Which release the service is; told once where it is another than the client's. Raises NotSubpage."""
        reply, release = await self._get("/version", 1 << 16), None
        if reply.status == 200:
            with suppress(NotSubpage):
                release = reply.json()
        if not isinstance(release, dict) or release.get("name") != "subpage":
            raise NotSubpage(f"{self.url} answers, and is not Subpage: is that the URL of the service?")
        self.met = release
        version = str(release.get("version"))[:40]
        if version != VERSION and (self.url, version) not in _TOLD:
            _TOLD.add((self.url, version))
            text = f"{self.url} is Subpage {version}, this client is {VERSION}; {await self._difference()}"
            warnings.warn(text, VersionMismatch, stacklevel=2)
        return release

    async def _difference(self) -> str:
        try:
            ours, theirs = set(ROUTES), set(await self._contract())
        except Error:  # the call itself may still go well
            return "what differs cannot be read from it"
        listed = {"only the service has": sorted(theirs - ours), "only the client knows": sorted(ours - theirs)}
        parts = (f"{who}: {', '.join(names[:8])}{' …' * (len(names) > 8)}" for who, names in listed.items() if names)
        return "; ".join(parts) or "both have the same operations"

    async def _contract(self) -> dict[str, Route]:
        """The operations that the service itself lists."""
        reply = await self._get("/openapi.json", _CONTRACT_BYTES)
        try:
            return {
                operation["operationId"]: Route(method.upper(), path)
                for path, item in reply.json()["paths"].items()
                for method, operation in item.items()
                if isinstance(operation, dict)
            }
        except (KeyError, TypeError, AttributeError):
            raise NotSubpage(f"{self.url}/openapi.json is not the contract of Subpage") from None

    async def _route(self, operation: str) -> Route:
        """An operation that is younger than the client."""
        found = await self._contract()
        self._routes = {**found, **ROUTES}
        if operation not in self._routes:
            near = difflib.get_close_matches(operation, self._routes, 1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise BadInput(f"{operation!r} is no operation of {self.url}{hint}")
        return self._routes[operation]


def filled(operation: str, template: str, given: Mapping[str, Any]) -> str:
    """A path with its names replaced. Raises BadInput when one is missing or is not there."""
    result = template
    for name, value in given.items():
        place = f"{{{name}}}"
        if place not in template:
            raise BadInput(f"{operation} has no {name!r} in its path {template}")
        text = _word(value)
        if not text.strip("."):
            raise BadInput(f"{operation}: {name!r} is empty, or dots, which a path has a meaning for")
        result = result.replace(place, quote(text, safe=""))
    if "{" in result:
        raise BadInput(f"{operation}: the path {template} needs {result.partition('{')[2].partition('}')[0]!r}")
    return result


def _word(value: Any) -> str:
    """A value of a query or a path."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(_word, value))
    return str(value)


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as what JSON has."""
    for name in ("tolist", "item"):
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"{type(value).__name__} is not a value of JSON")
