"""Method (i): a replay that asks about every violation, and the tool that answers."""

from __future__ import annotations

import json
import threading

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bench.data import Policy, Trace
from bench.http_replay import HttpReplay


class AllowedReplay(HttpReplay):
    """As its base, with ``allow``."""

    def __init__(self, port: int, kind: str, trace: Trace, policy: Policy) -> None:
        super().__init__(port, kind, trace, policy)
        self._query += "&on_violation=allow"


class AskedReplay(HttpReplay):
    """As its base, with a tool that says ``skip`` each time. ``questions`` counts those of the last round."""

    def __init__(self, port: int, kind: str, trace: Trace, policy: Policy) -> None:
        super().__init__(port, kind, trace, policy)
        self._query += "&on_violation=ask" if self._query else "?on_violation=ask"
        self.questions = 0

    def run(self) -> None:
        self.questions = 0
        with connect(f"ws://127.0.0.1:{self._port}{self.path}/introspection", compression=None) as socket:
            socket.send('{"type": "attach"}')
            socket.recv()
            answering = threading.Thread(target=self._answer_all, args=(socket,))
            answering.start()
            super().run()
        answering.join()

    def _answer_all(self, socket) -> None:  # type: ignore[no-untyped-def]
        try:
            for text in socket:
                message = json.loads(text)
                if message["type"] == "violation":
                    self.questions += 1
                    socket.send(json.dumps({"type": "answer", "id": message["id"], "action": "skip"}))
        except ConnectionClosed:
            return
