"""Answers under Idempotency-Keys: where they are kept, and how a commit takes note of the key it was made under."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response

from service.runtime.repository import Repository
from service.storage.records import AnswerRecord, Change, Side

_OVERHEAD = 512
# Stands where the status of an answer would: the change is committed, its answer was not kept.
CARRIED_OUT = 0

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, and ``fingerprint``, the hash of the request that it answered; empty where that was not known
    yet. With status ``CARRIED_OUT`` the answer was lost, and the body is the URL of what the request changed."""

    fingerprint: bytes
    status: int
    headers: Headers
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers) + _OVERHEAD


class Answers(Protocol):
    """Where answers are kept. One process at a time uses them, so nobody else adds one meanwhile."""

    async def find(self, owner: str, key: str) -> Answer | None:
        """The answer under ``key``, unless it is too old."""

    async def keep(self, owner: str, key: str, answer: Answer) -> None:
        """Keep it from now on."""

    async def used(self, owner: str) -> int:
        """Bytes that the answers of ``owner`` take."""


class MemoryAnswers:
    """Answers for as long as the process lives, ``seconds`` each."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._answers: dict[tuple[str, str], tuple[float, Answer]] = {}  # in the order of their end
        self._used: dict[str, int] = {}

    def _forget_old(self) -> None:
        now = self._clock()
        while self._answers:
            owner, key = next(iter(self._answers))
            until, answer = self._answers[owner, key]
            if now < until:
                return
            del self._answers[owner, key]
            self._used[owner] -= answer.size
            if not self._used[owner]:
                del self._used[owner]

    async def find(self, owner: str, key: str) -> Answer | None:
        self._forget_old()
        _, answer = self._answers.get((owner, key), (0.0, None))
        return answer

    async def keep(self, owner: str, key: str, answer: Answer) -> None:
        self._forget_old()
        self._answers[owner, key] = (self._clock() + self._seconds, answer)
        self._used[owner] = self._used.get(owner, 0) + answer.size

    async def used(self, owner: str) -> int:
        self._forget_old()
        return self._used.get(owner, 0)


def _now() -> int:
    return time.time_ns() // 1_000_000


class StoredAnswers:
    """Answers in the store, ``seconds`` each, also over restarts. Raises StoreUnavailable."""

    def __init__(self, repository: Repository, seconds: float) -> None:
        self._repository = repository
        self._lasting = int(seconds * 1000)

    async def find(self, owner: str, key: str) -> Answer | None:
        record = await self._repository.answer(owner, key, _now())
        if record is None:
            return None
        coded = [[base64.b64decode(text) for text in header] for header in json.loads(record.headers)]
        return Answer(record.fingerprint, record.status, tuple((name, value) for name, value in coded), record.body)

    async def keep(self, owner: str, key: str, answer: Answer) -> None:
        await self._repository.note(Side(answers=(self.record(owner, key, answer),), expired=_now()))

    async def used(self, owner: str) -> int:
        return await self._repository.answers_used(owner, _now())

    def record(self, owner: str, key: str, answer: Answer) -> AnswerRecord:
        """An answer that is given now, as the store keeps it."""
        coded = [[base64.b64encode(part).decode("ascii") for part in header] for header in answer.headers]
        until = _now() + self._lasting
        return AnswerRecord(
            owner, key, answer.fingerprint, answer.status, json.dumps(coded), answer.body, answer.size, until
        )


@dataclass(slots=True)
class Keyed:
    """A request under a key that is being carried out; a hook of its commits.

    ``fingerprint`` is asked for the hash of the request, which is empty until its body has been read.
    """

    answers: Answers
    owner: str
    key: str
    fingerprint: Callable[[], bytes]
    prepared: Answer | None = field(default=None)

    def __call__(self, change: Change) -> Side | None:
        if not isinstance(self.answers, StoredAnswers):
            return None
        answer = self.prepared or Answer(self.fingerprint(), CARRIED_OUT, (), _changed(change).encode())
        return Side(answers=(self.answers.record(self.owner, self.key, answer),))

    def will_answer(self, response: Response) -> None:
        """What the request is going to be answered when its next commit is made, so that the one is stored with the
        other. Nothing while its body has not been read to its end."""
        if fingerprint := self.fingerprint():
            headers = tuple((bytes(name), bytes(value)) for name, value in response.raw_headers)
            self.prepared = Answer(fingerprint, response.status_code, headers, bytes(response.body))


def _changed(change: Change) -> str:
    """URL of what a change makes or changes."""
    if change.after is None:
        made = [record.id for side in change.sides for record in side.footprints]
        return f"/v1/footprints/{made[0]}" if made else ""
    vm = f"/v1/vms/{change.after.id}"
    return f"{vm}/traces/{change.traces[-1].id}" if change.traces else vm


def answers_of(repository: Repository, seconds: float) -> Answers:
    """Where answers are kept for as long: with the machines."""
    return StoredAnswers(repository, seconds) if repository.durable else MemoryAnswers(seconds)
