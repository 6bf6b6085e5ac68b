"""Live introspection: a tool that is asked about every write to what it guards, and changes the machine while it is.

The guest is a driver that keeps patching a table. The tool lets it patch the entries it owns (`allow`), refuses others
(`skip`), opens a scratch area the first time that it is written (a change of the bitmap, then `retry`) and trusts one
object for good (`grant`).

Run: `.venv/bin/python examples/live_introspection.py [URL]`; without a URL it starts a service of its own.
"""

import json
import sys
import threading
from collections import Counter

import httpx2
from connect import connect, guest
from websockets.sync import client as websocket

TABLE, SCRATCH, TRUSTED = 0x2000, 0x3000, 0x4000
OWNED = range(TABLE, TABLE + 0x80)

OBJECTS = [
    {"name": "table", "gpa": TABLE, "size": 256},
    {"name": "trusted", "gpa": TRUSTED, "size": 128},
]
WRITES = [TABLE, TABLE + 0x80, SCRATCH, SCRATCH + 8, TRUSTED, TRUSTED + 8, TABLE + 8, TABLE + 0x88]


class Tool(threading.Thread):
    """Attached to one machine; answers until the connection is closed."""

    def __init__(self, api: httpx2.Client, home: str, socket: websocket.ClientConnection) -> None:
        super().__init__()
        self.api, self.home, self.socket = api, home, socket
        self.said: Counter[str] = Counter()
        self.socket.send(json.dumps({"type": "attach", "priority": 10, "default_action": "stop"}))
        assert json.loads(self.socket.recv())["type"] == "attached"

    def run(self) -> None:
        for text in self.socket:
            message = json.loads(text)
            if message["type"] == "violation":
                action = self.decide(message["exit"])
                self.said[action] += 1
                self.socket.send(json.dumps({"type": "answer", "id": message["id"], "action": action}))

    def decide(self, refused: dict) -> str:
        gpa = int(refused["gpa"], 16)
        if refused["objects"] == ["trusted"]:
            return "grant"
        if refused["objects"] == ["table"]:
            return "allow" if gpa in OWNED else "skip"
        window = {"gfn": refused["gfn"], "npages": 1}
        self.api.put(f"{self.home}/subpages", params=window, json={"access": ["0xffffffff"]}).raise_for_status()
        return "retry"


def main(url: str | None) -> None:
    with connect(url) as client, guest(client) as home:
        client.post(f"{home}/protections", json={"name": "driver", "objects": OBJECTS}).raise_for_status()
        window, shut = {"gfn": SCRATCH >> 12, "npages": 1}, {"access": [0]}
        client.put(f"{home}/subpages", params=window, json=shut).raise_for_status()
        address = str(client.base_url).replace("http", "ws", 1).rstrip("/") + f"{home}/introspection"
        with websocket.connect(address, subprotocols=["subpage.introspection.v1"]) as socket:
            tool = Tool(client, home, socket)
            tool.start()
            accesses = {"accesses": [{"gpa": gpa} for gpa in WRITES]}
            reply = client.post(f"{home}/traces", params={"on_violation": "ask"}, json=accesses).raise_for_status()
        tool.join()
        result = reply.json()

    said = ", ".join(f"{action} {count}" for action, count in sorted(tool.said.items()))
    print(f"{tool.said.total()} questions: {said}")
    assert tool.said == {"allow": 2, "skip": 2, "grant": 1, "retry": 1}
    assert (result["records"], result["violations"]) == (len(WRITES), tool.said.total())
    hits = {name: hit["violations"] for name, hit in result["by_object"].items()}
    assert hits == {"table": 4, "trusted": 1}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
