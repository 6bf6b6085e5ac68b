"""A service on a free port of this machine, in a thread of the test process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from service.app import create_app, drain, end_streams
from service.http.frames import PatientSocket
from service.http.sockets import MESSAGE_BYTES
from service.security.tokens import TokenStore
from service.settings import Settings
from tests.contract.client import ContractClient


@dataclass
class Running:
    """The service, and a client that checks every exchange against the contract."""

    app: FastAPI
    client: ContractClient
    url: str
    port: int


class _Server(uvicorn.Server):
    """Lets go of those who read events before it waits for them, as the service's own does."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            drain(self._app)
            end_streams(self._app)
        finally:
            await super().shutdown(sockets)


@contextlib.contextmanager
def running(settings: Settings | None = None, tokens: TokenStore | None = None) -> Iterator[Running]:
    """Start a service, stop it at the end."""
    app = create_app(settings or Settings(warm_up=False), tokens=tokens)
    server = _Server(
        uvicorn.Config(app, port=0, log_level="error", access_log=False, ws=PatientSocket, ws_max_size=MESSAGE_BYTES),
        app,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with ContractClient(base_url=url, timeout=300.0) as client:
            yield Running(app, client, url, port)
    finally:
        server.should_exit = True
        thread.join()
