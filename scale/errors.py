"""What can be wrong with sources, with partial results, and with a cluster."""

from __future__ import annotations


class ScaleError(Exception):
    """The text names the file or the cluster, and says what is wrong and what to do."""
