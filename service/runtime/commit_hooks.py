"""What is stored in the same transaction as a change, whichever change that is.

A job is done when its replay is committed, not a moment earlier or later; a request is never carried out without its
Idempotency-Key being taken. Both are asked when the change is handed in, instead of following it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from service.storage.records import Change, Side

CommitHook = Callable[[Change], Side | None]
"""Says what to store beside a change; None for nothing."""
CommitHooks = Sequence[CommitHook]


def with_sides(change: Change, hooks: CommitHooks) -> Change:
    """``change`` with what ``hooks`` say."""
    return replace(change, sides=(*change.sides, *(side for hook in hooks if (side := hook(change)) is not None)))
