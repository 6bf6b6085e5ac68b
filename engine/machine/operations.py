"""What every group of operations on a machine's vCPUs has: the configuration, what is published, and how it changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from engine.machine.nested_states import NestedStates
from engine.state.config import VmConfig
from engine.state.frame_store import Draft, Snapshot


class Operations:
    """``published`` gives the state that readers see; ``change`` a draft that is published when its block ends well."""

    def __init__(
        self,
        config: VmConfig,
        published: Callable[[], tuple[Snapshot, NestedStates]],
        change: Callable[[], AbstractContextManager[Draft]],
    ) -> None:
        self._config = config
        self._published = published
        self._change = change
