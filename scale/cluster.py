"""A cluster of Ray: this process's own, or one that is there."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from scale.errors import ClusterError

LOCAL, AUTO = "local", "auto"
CLUSTERS = "local, auto, HOST:PORT or ray://HOST:PORT"
_SECONDS = 5.0  # for an address to answer
_PLACE = re.compile(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})")

# A task is begun again so often when the worker or the node that it ran on is gone. Not for ever: it may be the task
# that is too large for every one of them.
RETRIES = 16


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """The module ``ray``, connected: to ``local``, one of this process on this machine; ``auto``, the one of this
    machine or of ``RAY_ADDRESS``; ``HOST:PORT`` or ``ray://HOST:PORT``. Its nodes must have this release.

    Raises ClusterError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked us to tell others
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError:
        raise ClusterError(address, "Ray is not installed: `pip install 'subpage[scale]'`") from None
    check_place(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == LOCAL else None,
        )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        with suppress(Exception):
            ray.shutdown()
        raise _not_there(address, error) from None
    try:
        _check_nodes(ray, address)
        yield ray
    finally:
        ray.shutdown()


def is_place(address: str) -> bool:
    """Whether it is what an address looks like."""
    return address in (LOCAL, AUTO) or _PLACE.fullmatch(address) is not None


def check_place(address: str) -> None:
    """Refuse what nothing listens at: Ray itself would wait for it for a long time. Raises ClusterError."""
    if address in (LOCAL, AUTO):
        return
    match = _PLACE.fullmatch(address)
    if match is None:
        raise ClusterError(address, f"must be {CLUSTERS}")
    try:
        socket.create_connection((match[1], int(match[2])), _SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _not_there(address, error) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(f"{match[1]}:{match[2]}"):
        raise _not_there(address, TimeoutError("what listens there is something else"))


def _speaks_grpc(place: str) -> bool:
    """As the head of a cluster does. Ray would try for a minute, and end the process then."""
    import grpc  # noqa: PLC0415 - comes with Ray

    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def _not_there(address: str, error: Exception) -> ClusterError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    if address == AUTO:
        return ClusterError(
            address, "no cluster of Ray runs on this machine", f" ({why}). `ray start --head` starts one"
        )
    return ClusterError(address, "no cluster of Ray answers there", f": {why}")


def _check_nodes(ray: Any, address: str) -> None:
    from scale import tasks  # noqa: PLC0415 - needs Ray

    try:
        found = ray.get(tasks.release.remote(), timeout=120)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(address, "the cluster has no processor that is free for two minutes") from None
    except (ray.exceptions.RayError, ImportError) as error:
        why = str(error).strip().rpartition("\n")[2]
        rule = "its nodes cannot run subpage"
        raise ClusterError(address, rule, f": {why}. Install the same release there") from None
    if found != tasks.release_here():
        raise ClusterError(address, "its nodes have another release of subpage: install this one there")
