"""uvicorn around the application: one process, one event loop."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import sys

import uvicorn

from service.app import create_app
from service.settings import Settings


class _Server(uvicorn.Server):
    """Says where it listens, which only it knows when the port was left to the system."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()
        gc.enable()
        if self.started:
            listening = self.servers[0].sockets[0].getsockname()
            host = f"[{listening[0]}]" if ":" in listening[0] else listening[0]
            sys.stdout.write(f"subpage is listening on http://{host}:{listening[1]}\n")
            sys.stdout.flush()


def run(settings: Settings, *, access_log: bool = False, log_level: str = "warning") -> int:
    """Serve until SIGINT or SIGTERM, then let requests end for a while; the exit status of the process."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=access_log,
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    server = _Server(config)
    # uvicorn raises the signal that stopped it once more after its shutdown; being told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    # The interpreter looks for garbage once more when it ends; in all that numba keeps, this takes half a second.
    gc.freeze()
    return 0 if server.started else 3
