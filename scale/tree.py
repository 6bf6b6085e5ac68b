"""Many things put together a few at a time, so that few of them are held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

FAN_IN = 8


class Tree(Generic[T]):
    """Of each height fewer than FAN_IN are held: when there are so many, ``combine`` makes one of the next height of
    them. What reaches the height ``top`` is given ``out`` instead. In what order things come makes no difference where
    ``combine`` makes none."""

    def __init__(
        self,
        combine: Callable[[Sequence[T]], T],
        top: int | None = None,
        out: Callable[[T], object] = lambda item: None,
    ) -> None:
        self._combine, self._top, self._out = combine, top, out
        self._held: list[list[T]] = []

    def add(self, item: T) -> None:
        """Take one."""
        height = 0
        while height != self._top:
            if len(self._held) == height:
                self._held.append([])
            held = self._held[height]
            held.append(item)
            if len(held) < FAN_IN:
                return
            item = self._combine(held)
            held.clear()
            height += 1
        self._out(item)

    def close(self) -> T | None:
        """All of them as one; None where there are none."""
        rest = [item for held in self._held for item in held]
        self._held = []
        return rounds(self._combine, rest)[0] if rest else None


def rounds(combine: Callable[[Sequence[T]], T], items: Sequence[T]) -> list[T]:
    """One of them all, in their order, in a list; nothing of nothing."""
    left = list(items)
    while len(left) > 1:
        groups = [left[at : at + FAN_IN] for at in range(0, len(left), FAN_IN)]
        left = [group[0] if len(group) == 1 else combine(group) for group in groups]
    return left
