"""uvicorn around the application: one process, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import resource
import signal
import socket
import ssl
import sys
from importlib.util import find_spec
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from service.app import create_app, drain, end_streams
from service.http.connection import patient
from service.http.frames import PatientSocket
from service.http.sockets import MESSAGE_BYTES, PING_SECONDS
from service.platform.failures import Failure
from service.runtime.container_memory import container_bytes, warn_of_memory
from service.security.access import AccessControl, is_loopback
from service.security.tokens import TokensUnavailable
from service.settings import Settings
from service.telemetry.logs import configure


class _Server(uvicorn.Server):
    """Says where it listens, which only it knows when the port was left to the system, and drains before it stops."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Told to stop: unready at once, so that balancers look elsewhere; deaf after the drain. Twice means now."""
        loop = self._loop
        drain(self._app)
        if loop is not None:
            loop.call_soon_threadsafe(end_streams, self._app)
        if loop is None or self._draining or not self._drain_seconds:
            super().handle_exit(sig, frame)
            return
        self._draining = True
        stop = super().handle_exit
        # From a signal handler, hence thread-safe.
        loop.call_soon_threadsafe(lambda: loop.call_later(self._drain_seconds, stop, sig, frame))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        gc.freeze()
        gc.enable()
        if self.started:
            listening = self.servers[0].sockets[0].getsockname()
            host = f"[{listening[0]}]" if ":" in listening[0] else listening[0]
            scheme = "https" if self.config.is_ssl else "http"
            sys.stdout.write(f"subpage is listening on {scheme}://{host}:{listening[1]}\n")
            sys.stdout.flush()


class Refused(Failure):
    """The service does not start like this; the text says what to do."""

    status = 2


class NotListening(Failure):
    """The service cannot listen where it should."""

    status = 3


_NOT_LISTENING = {
    errno.EADDRINUSE: "port {port} of {host} is in use: stop what listens there, or choose another by --port (0: any)",
    errno.EACCES: "this user may not listen on port {port}: choose one above 1023 with --port",
    errno.EADDRNOTAVAIL: "{host} is no address of this machine: choose another with --host",
}


def listeners(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for every address that ``host`` stands for. Raises NotListening."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(listener := socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        for listener in sockets:
            listener.close()
        if isinstance(error, (socket.gaierror, UnicodeError)):
            raise NotListening(f"there is no host {host}: choose another with --host") from None
        told = _NOT_LISTENING.get(error.errno or 0, "cannot listen on port {port} of {host}: {reason}")
        raise NotListening(told.format(host=host, port=port, reason=error.strerror or error)) from None
    return sockets


def check_exposure(settings: Settings, access: AccessControl) -> None:
    """Raise Refused when strangers could reach the service and nobody would need a token."""
    if is_loopback(settings.host):
        return
    try:
        access.load()
    except TokensUnavailable as error:
        if not access.usable:
            raise Refused(f"the tokens cannot be read: {error}") from error
    if not access.usable:
        raise Refused(
            f"{settings.host} can be reached from other machines, and there is no valid token. Make one with "
            "`subpage token create`, or give one in SUBPAGE_TOKEN; or listen on 127.0.0.1, which needs none."
        )


def check_telemetry(settings: Settings) -> None:
    """Raise Refused when telemetry is asked for and what it needs is not installed."""
    if settings.telemetry and find_spec("opentelemetry.sdk") is None:
        raise Refused("SUBPAGE_TELEMETRY needs the OpenTelemetry SDK: install subpage[telemetry]")


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


def patient_loop(seconds: float) -> type[uvloop.Loop]:
    """The class of event loops whose TLS handshakes, too, may take ``seconds``, 0 for any time that the loop allows."""

    class Loop(uvloop.Loop):
        async def create_server(self, *args: Any, **options: Any) -> asyncio.AbstractServer:  # type: ignore[override]
            if options.get("ssl") is not None and seconds:
                options |= {"ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": seconds}
            return await super().create_server(*args, **options)

    return Loop


def raise_file_limit() -> None:
    """Take as many open files as the system allows: each connection is one, and readers of events stay for long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves ``app``."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop=patient_loop(settings.head_timeout),  # type: ignore[arg-type]
        http=patient(settings.head_timeout),
        ws=PatientSocket,
        ws_max_size=MESSAGE_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ws_per_message_deflate=False,  # messages are small and wait for somebody
        log_config=None,
        access_log=False,  # the application writes its own, with the ids of requests
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
        **tls_options(settings),
    )


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM, then let requests end for a while; the exit status of the process.

    Raises Refused, NotListening.
    """
    configure(settings)
    check_telemetry(settings)
    app = create_app(settings)
    check_exposure(settings, app.state.access)
    warn_of_memory(settings, container_bytes())
    raise_file_limit()
    sockets = listeners(settings.host, settings.port)
    config = configured(app, settings)
    server = _Server(config, app, settings.drain_seconds)
    # uvicorn raises the signal that stopped it once more after its shutdown; being told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)
    # The interpreter looks for garbage once more when it ends; in all that numba keeps, this takes half a second.
    gc.freeze()
    return 0 if server.started else 3
