"""What an opening handshake of a WebSocket needs beside what every request needs: whose page it is, and the token."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from service.problems import Forbidden

# Browsers cannot set Authorization on a WebSocket; they can offer subprotocols. The service never selects this one, so
# that the token is not sent back.
TOKEN_PREFIX = "subpage.bearer."

# The largest message taken (1009 beyond that), and how often a silent peer is asked whether it is there: one that does
# not answer within the same time is gone.
MESSAGE_BYTES = 64 << 10
PING_SECONDS = 5.0


def token_among(subprotocols: Sequence[str]) -> bytes | None:
    """The value that Authorization would have, from a subprotocol ``subpage.bearer.<token>``."""
    for offered in subprotocols:
        if offered.startswith(TOKEN_PREFIX):
            return b"Bearer " + offered.removeprefix(TOKEN_PREFIX).encode("latin-1", "replace")
    return None


def check_origin(origin: bytes | None, host: bytes | None, allowed: Sequence[str]) -> None:
    """Refuse pages of other origins than CORS allows: a browser opens a WebSocket to anywhere, with no preflight.

    What is no browser sends no Origin. Raises Forbidden.
    """
    if origin is None:
        return
    given = origin.decode("latin-1")
    if given in allowed or "*" in allowed:
        return
    try:
        own = host is not None and urlsplit(given).netloc.lower() == host.decode("latin-1").lower()
    except ValueError:
        own = False
    if not own:
        raise Forbidden("must be the service's own or one of cors_origins", field="Origin", value=given)
