"""What a transport carries, and what it makes of failures."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from subpage.errors import BadInput, Error, NotSubpage, StreamBroken, TooLarge, Unreachable, Untrusted, parsed

Pieces = Callable[[], Any]
"""Makes an iterator, or an asynchronous iterator, of the bytes of a body; where it is called again, once more."""

LINE_BYTES = 1 << 20  # of a line of a stream: an event, an exit record
MESSAGE_BYTES = 1 << 20  # of a message of a socket


@dataclass(slots=True)
class Request:
    """One HTTP request. ``patience`` is how many seconds may pass without a byte of the reply; None: any."""

    method: str
    url: str
    headers: dict[str, str]
    content: bytes | Pieces | None = None
    patience: float | None = 30.0


@dataclass(slots=True)
class Reply:
    """A whole reply. ``call`` returns it."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """The document in it, None where there is no body. Raises NotSubpage."""
        found = parsed(self.content)
        if found is None and self.content:
            raise NotSubpage("the reply is not the JSON that Subpage would have sent")
        return found

    @property
    def etag(self) -> str | None:
        """Its entity tag, for ``If-Match``."""
        return self.headers.get("etag")


class SocketClosed(Exception):
    """A socket has ended, by the close code; 1006 where there was none."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def trusting(authorities: str | Path | None) -> ssl.SSLContext | bool:
    """TLS with servers that these vouch for; with those that the system trusts by default. Raises BadInput."""
    if authorities is None:
        return True
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:  # of which an SSLError is one
        said = "has no certificates in PEM form" if isinstance(error, ssl.SSLError) else error.strerror
        raise BadInput(f"{authorities}: {said}") from None


def told(url: str, error: Exception) -> Error:
    """Why there is no answer from ``url``, and what to do."""
    text = str(error)
    if isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
        return NotSubpage(f"{url}: must be a URL such as http://127.0.0.1:8000")
    unsent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout))
    if isinstance(error, httpx2.ConnectError) or isinstance(error.__cause__, ssl.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
            what = "give the authority that vouches for it (ca=, or --ca)"
            return Untrusted(f"the certificate of {url} is not trusted: {what}", unsent=True)
        if "SSL" in text:
            return Untrusted(f"{url} does not speak TLS as it should; perhaps it is http, not https", unsent=True)
        if "Errno -" in text:
            return Unreachable(f"there is no host of the name in {url}", unsent=True)
        return Unreachable(f"no service on {url}: start one with `subpage serve`, or say where it is", unsent=True)
    if isinstance(error, httpx2.TimeoutException):
        return Unreachable(f"{url} does not answer: is it the service, and is it well?", unsent=unsent)
    if isinstance(error, httpx2.RemoteProtocolError):
        return Unreachable(f"{url} ended the connection, or does not speak HTTP ({text})")
    return Unreachable(f"the connection to {url} was lost: {text or type(error).__name__}", unsent=unsent)


def checked(headers: Mapping[str, str], most: int) -> None:
    """Refuse a body before it is read. Raises TooLarge, NotSubpage for a coding that was not asked for."""
    if headers.get("content-encoding", "identity") != "identity":
        raise NotSubpage("the reply is coded, which was not asked for: is there a proxy that changes replies?")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > most:
        raise TooLarge(f"the reply has {length[:20]} bytes, the client takes {most}: raise most_bytes, or ask for less")


def document(line: bytes) -> dict[str, Any]:
    """A line as JSON. Raises StreamBroken."""
    found = parsed(line)
    if not isinstance(found, dict):
        raise StreamBroken("a line of the stream is not JSON")
    return found


def file_pieces(path: Path, size: int = 1 << 18) -> Iterator[bytes]:
    """A file piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece
