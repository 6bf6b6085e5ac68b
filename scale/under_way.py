"""Tasks of a cluster that are under way: so many as it can do at a time, and some more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from scale.errors import ScaleError

_AHEAD = 2  # tasks for each processor
_SECONDS = 1.0  # after which it is looked at whether nodes have come or gone

Then = Callable[[Any], object]
"""Takes what a task gave."""


class UnderWay:
    """``ray`` is connected. A lost worker's tasks are begun again by Ray, and nothing of that is seen here."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._tasks: dict[Any, tuple[str, Then]] = {}
        self._look, self._room = 0.0, 0  # when the size of the cluster is asked next, and what it has room for

    def __len__(self) -> int:
        return len(self._tasks)

    def has_room(self) -> bool:
        """Whether another one should be begun."""
        if time.monotonic() >= self._look:
            self._room = _AHEAD * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            self._look = time.monotonic() + _SECONDS
        return len(self._tasks) < self._room

    def follow(self, ref: Any, about: str, then: Then) -> None:
        """A task has begun that is ``about`` a file, and ``then`` is to be done with what it gives."""
        self._tasks[ref] = about, then

    def settle(self) -> None:
        """Wait for something to be done, and go on from it. Raises ScaleError."""
        done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=_SECONDS)
        for ref in done:
            about, then = self._tasks.pop(ref)
            then(self.said(ref, about))

    def said(self, ref: Any, about: str) -> Any:
        """What a task gave. Raises ScaleError."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ScaleError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            why = str(error).strip().partition("\n")[0]
            raise ScaleError(f"{about}: no worker could do it, however often it was tried: {why}") from None

    def cancel(self) -> None:
        """None of them is wanted any more."""
        for ref in self._tasks:
            self._ray.cancel(ref, force=False)
