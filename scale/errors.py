"""What can be wrong with sources, with partial results, and with a cluster."""

from __future__ import annotations


class ScaleError(Exception):
    """The text names the file or the cluster, and says what is wrong and what to do."""


class ClusterError(ScaleError):
    """There is no cluster that could do it: ``why``, to which the text adds its address and ``more``."""

    def __init__(self, address: str, why: str, more: str = "") -> None:
        super().__init__(f"--ray {address}: {why}{more}")
        self.why = why
