"""Changes of one machine that are committed together, because a transaction for each would keep all of them waiting.

They run one after another, each on the state that the one before it left, and are told of when their transaction has
ended. One that is refused leaves no trace in the group, but is told of then, too: what it was judged by is not
durable before.
"""

from __future__ import annotations

import asyncio

from engine.machine import VirtualMachine
from service.runtime.commit_hooks import CommitHook, CommitHooks

# Changes of one group; more would make the first wait long for the last.
MOST = 64


class Group:
    """``before`` is the machine as committed, ``machine`` as the last of the ``changes`` left it, ``hooks`` are theirs.

    With ``deletes`` the machine is deleted. ``over`` tells that the transaction has ended: well, or with ``error``.
    """

    def __init__(self, before: VirtualMachine) -> None:
        self.before = before
        self.machine = before
        self.changes = 0
        self.hooks: list[CommitHook] = []
        self.deletes = False
        self.over = self._closed = False
        self.error: BaseException | None = None
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def takes_more(self) -> bool:
        """Whether one more may join."""
        return not self._closed and self.changes < MOST and not self.machine.growth_is_near

    def add(self, machine: VirtualMachine, hooks: CommitHooks, *, joins: bool, deletes: bool) -> None:
        """A change has made ``machine`` of the one of before; unless it ``joins``, it is the only one."""
        self.machine = machine
        self.changes += 1
        self.hooks += hooks
        self.deletes, self._closed = deletes, not joins

    def end(self, error: BaseException | None = None) -> None:
        """The transaction has ended: let everybody know."""
        self.over, self.error = True, error
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def ended(self) -> None:
        """Wait for the end whatever happens: a cancelled caller takes note of it first. Raises ``error``."""
        cancelled = False
        while not self.over:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            try:
                await future
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # delivered at the next wait
        if self.error is not None:
            # Not with the traceback of all who were told before.
            raise self.error.with_traceback(None)
