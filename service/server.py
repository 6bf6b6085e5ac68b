"""uvicorn around the application: one process, one event loop."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import ssl
import sys
from typing import Any

import uvicorn

from service.app import create_app
from service.security.access import AccessControl, is_loopback
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
            scheme = "https" if self.config.is_ssl else "http"
            sys.stdout.write(f"subpage is listening on {scheme}://{host}:{listening[1]}\n")
            sys.stdout.flush()


class Refused(Exception):
    """The service does not start like this; the text says what to do."""


def check_exposure(settings: Settings, access: AccessControl) -> None:
    """Raise Refused when strangers could reach the service and nobody would need a token."""
    if not is_loopback(settings.host) and not access.usable:
        raise Refused(
            f"{settings.host} can be reached from other machines, and there is no valid token. Make one with "
            "`subpage token create` in the file that SUBPAGE_TOKEN_FILE names, or give one in SUBPAGE_TOKEN; "
            "or listen on 127.0.0.1, which needs none."
        )


def tls_options(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told of TLS; nothing unless there is a certificate."""
    if settings.tls_certificate is None:
        return {}
    password = settings.tls_key_password
    return {
        "ssl_certfile": str(settings.tls_certificate),
        "ssl_keyfile": str(settings.tls_key) if settings.tls_key is not None else None,
        "ssl_keyfile_password": password.get_secret_value() if password is not None else None,
        "ssl_ca_certs": str(settings.tls_client_ca) if settings.tls_client_ca is not None else None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.tls_client_ca is not None else ssl.CERT_NONE,
    }


def run(settings: Settings, *, access_log: bool = False, log_level: str = "warning") -> int:
    """Serve until SIGINT or SIGTERM, then let requests end for a while; the exit status of the process.

    Raises Refused.
    """
    app = create_app(settings)
    check_exposure(settings, app.state.access)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=access_log,
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
        **tls_options(settings),
    )
    server = _Server(config)
    # uvicorn raises the signal that stopped it once more after its shutdown; being told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    # The interpreter looks for garbage once more when it ends; in all that numba keeps, this takes half a second.
    gc.freeze()
    return 0 if server.started else 3
