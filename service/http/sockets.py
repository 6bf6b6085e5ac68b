"""WebSockets: the token that an opening handshake may carry, and the connection under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

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


class SocketConnection(WebSocketsSansIOProtocol):
    """uvicorn's connection, which knows that an opening that was refused with a response is complete.

    Without that it reports an error of the application for each of them, as often as strangers like.
    """

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True
