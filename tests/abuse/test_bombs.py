"""Bombs and floods at a server with default settings, one by one and all at once: it stays small and answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache

import httpx2
import pytest

from service.settings import MIB
from tests.abuse.bodies import ATTACKS, JSON, NDJSON, packed
from tests.abuse.frames import WITHOUT_END as FRAMES
from tests.abuse.frames import opened
from tests.abuse.heads import WITHOUT_END
from tests.abuse.hostile import attack
from tests.abuse.process import Service, flood, settled
from tests.support.http import new_vm

PEAK = 1024 * MIB
_PIECE = 96 * MIB


def _huge() -> dict[str, tuple[str, bytes]]:
    """A gigabyte each, in less than 200 kB: empty objects, one text, one record, a line, a document of numbers."""
    many = 1024 * MIB // _PIECE
    return {
        "350 million objects": (JSON, packed(b'{"accesses": [') + packed(b"{}," * (_PIECE // 3)) * many),
        "one text": (JSON, packed(b'"') + packed(b"a" * _PIECE) * many),
        "one line": (NDJSON, packed(b'"') + packed(b"a" * _PIECE) * many),
        "one number": (JSON, packed(b'{"accesses": [{"gpa": ') + packed(b"9" * _PIECE) * many),
        "depth": (JSON, packed(b'{"accesses": ') + packed(b"[" * _PIECE) * many),
    }


@cache
def _bombs() -> dict[str, tuple[str, bytes]]:
    """Media type and body of each; those that are JSON are coded."""
    made = {name: (media, make()) for name, (media, make, _) in ATTACKS.items() if media not in (JSON, NDJSON)}
    return made | _huge()


def throw(client: httpx2.Client, vm: str, name: str, preference: str | None) -> int:
    """The status that a body ends in."""
    media, body = _bombs()[name]
    headers = {"Content-Type": media, **({"Prefer": preference} if preference else {})}
    headers |= {"Content-Encoding": "zstd"} if media in (JSON, NDJSON) else {}
    reply = client.post(f"{vm}/traces", content=body, headers=headers)
    return int(settled(client, reply).get("status", reply.status_code))


@pytest.mark.abuse
@pytest.mark.parametrize("preference", [None, "respond-async"], ids=["call", "job"])
def test_bombs_at_a_server_with_defaults(victim: Service, preference: str | None) -> None:
    """With more memory for a body some are no attack any more: they are taken, or refused for what they say."""
    victim.forget()
    with victim.client() as client:
        vm = new_vm(client, translation_cache="model")
        for name in _bombs():
            assert throw(client, vm, name, preference) in (201, 202, 400, 413, 422), name
            assert victim.peak() < PEAK, name
        assert client.delete(vm).status_code == 204


@pytest.mark.abuse
def test_floods_and_bombs_at_once(victim: Service) -> None:
    """Four floods of the wire, two of frames, bombs of two clients and hostile values, for twenty seconds."""
    victim.forget()
    end, faults = time.monotonic() + 20, list[BaseException]()

    def over_and_over(what: Callable[[int], object]) -> threading.Thread:
        def run() -> None:
            try:
                number = 0
                while time.monotonic() < end:
                    what(number)
                    number += 1
            except BaseException as fault:  # noqa: BLE001 - it is the test's
                faults.append(fault)

        return threading.Thread(target=run)

    def wire(number: int) -> None:
        begin, piece, _ = list(WITHOUT_END.values())[number % len(WITHOUT_END)]
        with victim.connect() as connection:
            connection.sendall(begin)
            flood(connection, piece, 2, most=32 * MIB)

    with victim.client() as client:
        vm = new_vm(client, translation_cache="model")

        def frames(number: int) -> None:
            begin, piece, _ = list(FRAMES.values())[number % len(FRAMES)]
            with opened(victim, f"{vm}/introspection") as connection:
                connection.sendall(begin)
                flood(connection, piece, 2)

        def bomb(number: int) -> None:
            names = list(_bombs())
            assert throw(client, vm, names[number % len(names)], None) < 500

        attackers = [over_and_over(wire) for _ in range(4)] + [over_and_over(frames) for _ in range(2)]
        attackers += [over_and_over(bomb) for _ in range(2)]
        attackers.append(over_and_over(lambda number: attack(victim, seed=number, seconds=5)))
        for thread in attackers:
            thread.start()
        for thread in attackers:
            thread.join()
        assert not faults, faults
        assert client.get(vm).status_code == 200
    assert victim.peak() < PEAK
