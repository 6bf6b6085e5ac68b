"""Clients that change machines at random and know what the service must have after each acknowledged change.

A client has a machine of its own, a few pages of one that all share, and scratch machines that come and go. Its model
is one dictionary; an operation gives the next model and sends one request. What was sent and not answered may have been
carried out or not, but nothing between.
"""

from __future__ import annotations

import copy
import random
import struct
import threading
from collections.abc import Callable
from typing import Any

import httpx2

OCTETS = {"Content-Type": "application/octet-stream"}
RAM = 16 << 20
SET_PAGES = 32  # GFNs 0 to 31: SET maps
GRANT_GFN, GRANT_PAGES = 32, 8  # SET to 0; replays grant sub-pages here
MEMORY_GPA, MEMORY_BYTES = 0x40000, 16384
OBJECT_GPA = 0x80000  # to GFN 160
FREE_GFNS = (256, 4096)  # what replays touch besides
COMMON_PAGES = 8
KEPT_TRACES = 4
COMPARED_EVENTS = 30  # the last rows of the log

Model = dict[str, Any]
Operation = tuple[Model, Callable[[], httpx2.Response], tuple[int, ...]]


class Client:
    """One client. ``state`` is what was acknowledged, ``pending`` what the request under way would make of it."""

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.random = random.Random(seed)
        self.http = httpx2.Client()
        self.home = self.common = ""
        self.state: Model = {}
        self.pending: Model | None = None
        self.in_flight = False
        self.acknowledged = 0
        self.made = 0
        self.scratch: dict[str, str] = {}

    def connect(self, url: str) -> None:
        self.http.close()
        self.http = httpx2.Client(base_url=url, timeout=30.0)

    def settle_in(self, common: str) -> None:
        """Make the machine, and read the model off it."""
        slots = [{"slot": 0, "gpa": 0, "size": RAM}]
        reply = self.http.post("/v1/vms", json={"memory_slots": slots, "spp": True, "name": f"client {self.number}"})
        assert reply.status_code == 201, reply.text
        self.home, self.common = reply.headers["Location"], common
        shut = self.http.put(
            f"{self.home}/subpages",
            params={"gfn": GRANT_GFN, "npages": GRANT_PAGES},
            json={"access": [0] * GRANT_PAGES},
        )
        assert shut.status_code == 204, shut.text
        self.state = self.observed()

    # What the service has

    def observed(self) -> Model:
        vm = self._get(self.home)
        listed = self._get(f"{self.home}/traces")["traces"]
        for trace in listed:
            exits = self._get(f"{self.home}/traces/{trace['id']}/exits")
            assert len(exits["exit_records"]) == trace["violations"] and exits["next"] is None
        vms = self._get("/v1/vms?limit=1000")["vms"]
        mine = f"scratch {self.number} "
        return {
            "revision": vm["revision"],
            "set": self._maps(self.home, 0, SET_PAGES),
            "granted": self._maps(self.home, GRANT_GFN, GRANT_PAGES),
            "memory": self._content(f"{self.home}/memory?gpa={MEMORY_GPA}&size={MEMORY_BYTES}").hex(),
            "protections": [item["name"] for item in self._get(f"{self.home}/protections")["protections"]],
            "slots": [[slot["slot"], slot["gpa"]] for slot in vm["memory_slots"]],
            "replays": [[trace["records"], trace["violations"]] for trace in listed],
            "records": self._get(f"{self.home}/counters")["counters"]["records"],
            "events": self._events(),
            "common": self._maps(self.common, self.number * COMMON_PAGES, COMMON_PAGES),
            "scratch": sorted(vm["name"] for vm in vms if vm["name"].startswith(mine)),
        }

    def _events(self) -> list[list[Any]]:
        """The end of the event log by rows: last id, kind, count."""
        last = self._get(f"{self.home}/events?after=latest")["last"]
        found: list[list[Any]] = []
        path = f"{self.home}/events?expand=false&limit=1000"
        while path:
            page = self._get(path)
            found += [[item["id"], item["kind"], item["detail"].get("count", 1)] for item in page["events"]]
            path = page["next"]
        assert found[-1][0] == last
        return found[-COMPARED_EVENTS:]

    @staticmethod
    def _told(model: Model, kind: str, count: int = 1) -> None:
        """The model's log gets a row."""
        model["events"] = [*model["events"], [model["events"][-1][0] + count, kind, count]][-COMPARED_EVENTS:]

    def _get(self, path: str) -> Any:
        reply = self.http.get(path)
        assert reply.status_code == 200, f"{path}: {reply.text}"
        return reply.json()

    def _content(self, path: str) -> bytes:
        reply = self.http.get(path)
        assert reply.status_code == 200, reply.text
        return reply.content

    def _maps(self, home: str, gfn: int, npages: int) -> list[int]:
        shown = self._get(f"{home}/subpages?gfn={gfn}&npages={npages}")["access"]
        return [int(word, 16) for word in shown]

    def accept(self, observed: Model) -> tuple[int, int]:
        """Compare after a crash: (acknowledged changes lost, changes half applied). Goes on from what was observed."""
        allowed = [self.state] if self.pending is None else [self.state, self.pending]
        lost = half = 0
        if observed not in allowed:
            touched = {key for key in self.state if any(self.state[key] != model[key] for model in allowed)}
            untouched_differ = any(observed[key] != self.state[key] for key in self.state if key not in touched)
            lost, half = (1, 0) if untouched_differ or not touched else (0, 1)
        self.state, self.pending, self.in_flight = observed, None, False
        self.scratch = self.listed(observed)
        return lost, half

    def listed(self, observed: Model) -> dict[str, str]:
        """Where the scratch machines are: one whose creation was not answered is found only so."""
        listed = self._get("/v1/vms?limit=1000")["vms"]
        return {vm["name"]: f"/v1/vms/{vm['id']}" for vm in listed if vm["name"] in observed["scratch"]}

    # What it does

    def run(self, stop: threading.Event) -> None:
        """One change after the other until the server is gone."""
        try:
            while not stop.is_set():
                self.step()
        except httpx2.TransportError:
            return

    def step(self) -> None:
        after, send, expected = self.random.choice(
            [self._set, self._set, self._patch, self._write, self._protect, self._slot, self._common, self._scratch]
            + [self._replay] * 4
        )(copy.deepcopy(self.state))
        self.pending, self.in_flight = after, True
        reply = send()
        assert reply.status_code in expected, f"{reply.request.method} {reply.url}: {reply.status_code} {reply.text}"
        self.state, self.pending, self.in_flight = after, None, False
        self.acknowledged += 1

    def _set(self, model: Model) -> Operation:
        count = self.random.randint(1, 16)
        gfn = self.random.randint(0, SET_PAGES - count)
        words = [self.random.getrandbits(32) for _ in range(count)]
        model["set"][gfn : gfn + count] = words
        self._told(model, "subpages")
        model["revision"] += 1
        return model, lambda: self._put_maps(self.home, gfn, words), (204,)

    def _put_maps(self, home: str, gfn: int, words: list[int]) -> httpx2.Response:
        return self.http.put(f"{home}/subpages", params={"gfn": gfn, "npages": len(words)}, json={"access": words})

    def _patch(self, model: Model) -> Operation:
        ranges = []
        for gfn in self.random.sample(range(SET_PAGES), 8):
            word = self.random.getrandbits(32)
            model["set"][gfn] = word
            ranges.append({"gfn": gfn, "npages": 1, "access": word})
        model["granted"] = [0] * GRANT_PAGES
        self._told(model, "subpages")
        ranges.append({"gfn": GRANT_GFN, "npages": GRANT_PAGES, "access": 0})
        model["revision"] += 1
        return model, lambda: self.http.patch(f"{self.home}/subpages", json={"ranges": ranges}), (204,)

    def _write(self, model: Model) -> Operation:
        size = self.random.randint(1, MEMORY_BYTES)
        at = self.random.randint(0, MEMORY_BYTES - size)
        data = self.random.randbytes(size)
        memory = bytearray.fromhex(model["memory"])
        memory[at : at + size] = data
        model["memory"] = memory.hex()
        model["revision"] += 1
        target = f"{self.home}/memory?gpa={MEMORY_GPA + at}&size={size}"
        return model, lambda: self.http.put(target, content=data, headers=OCTETS), (204,)

    def _protect(self, model: Model) -> Operation:
        model["revision"] += 1
        self._told(model, "protection")
        if model["protections"] and self.random.random() < 0.5:
            name = model["protections"].pop(self.random.randrange(len(model["protections"])))
            return model, lambda: self.http.delete(f"{self.home}/protections/{name}"), (204,)
        self.made += 1
        name = f"p{self.made}"
        model["protections"].append(name)
        objects = [
            {"name": f"{name}.{part}", "gpa": OBJECT_GPA + self.random.randrange(0x20000), "size": 200}
            for part in range(4)
        ]
        return (
            model,
            lambda: self.http.post(f"{self.home}/protections", json={"name": name, "objects": objects}),
            (201,),
        )

    def _slot(self, model: Model) -> Operation:
        model["revision"] += 1
        slot = self.random.randint(1, 3)
        known = [item for item in model["slots"] if item[0] == slot]
        if known and self.random.random() < 0.4:
            model["slots"].remove(known[0])
            self._told(model, "memory-slot")
            return model, lambda: self.http.delete(f"{self.home}/memory-slots/{slot}"), (204,)
        gpa = (slot << 32) + (self.random.randint(1, 9) << 20)
        if known != [[slot, hex(gpa)]]:
            self._told(model, "memory-slot")
        model["slots"] = sorted([item for item in model["slots"] if item[0] != slot] + [[slot, hex(gpa)]])
        document = {"gpa": gpa, "size": 1 << 20}
        return model, lambda: self.http.put(f"{self.home}/memory-slots/{slot}", json=document), (200, 201)

    def _common(self, model: Model) -> Operation:
        words = [self.random.getrandbits(32) for _ in range(COMMON_PAGES)]
        model["common"] = words
        return model, lambda: self._put_maps(self.common, self.number * COMMON_PAGES, words), (204,)

    def _scratch(self, model: Model) -> Operation:
        if self.scratch and (len(self.scratch) > 2 or self.random.random() < 0.5):
            name, home = self.scratch.popitem()
            model["scratch"].remove(name)
            return model, lambda: self.http.delete(home), (204,)
        self.made += 1
        name = f"scratch {self.number} {self.made}"
        model["scratch"] = sorted([*model["scratch"], name])
        document = {"name": name, "spp": True, "memory_slots": [{"slot": 0, "gpa": 0, "size": RAM}]}

        def send() -> httpx2.Response:
            reply = self.http.post("/v1/vms", json=document)
            if reply.status_code == 201:
                self.scratch[name] = reply.headers["Location"]
            return reply

        return model, send, (201,)

    def _replay(self, model: Model) -> Operation:
        """Refused writes that open their sub-pages (grant) or are only counted (skip), among many that land."""
        grant = self.random.random() < 0.5
        targets = [
            (self.random.randrange(GRANT_PAGES), self.random.randrange(32)) for _ in range(self.random.randint(1, 40))
        ]
        refused = [target for target in targets if not model["granted"][target[0]] >> target[1] & 1]
        gpas = [(GRANT_GFN + page) << 12 | subpage << 7 for page, subpage in targets]
        gpas += [
            self.random.randrange(*FREE_GFNS) << 12 | self.random.randrange(512) << 3
            for _ in range(self.random.choice((10, 300, 2000)))
        ]
        violations = len(set(refused)) if grant else len(refused)
        if grant:
            for page, subpage in targets:
                model["granted"][page] |= 1 << subpage
        if violations:
            self._told(model, "violation", violations)
        self.random.shuffle(gpas)
        model["replays"] = [*model["replays"], [len(gpas), violations]][-KEPT_TRACES:]
        model["records"] += len(gpas)
        model["revision"] += 1
        target = f"{self.home}/traces?record=gpa8&on_violation={'grant' if grant else 'skip'}"
        body = struct.pack(f"<{len(gpas)}Q", *gpas)
        return model, lambda: self.http.post(target, content=body, headers=OCTETS), (201,)
