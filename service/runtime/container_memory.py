"""What the limits allow to be in memory at one time, held against what the container has."""

from __future__ import annotations

import logging
from pathlib import Path

from engine.machine import FRAME_BYTES
from service.runtime.bodies import PIECE
from service.settings import MIB, Settings

logger = logging.getLogger("subpage")

# The interpreter, its libraries and the compiled kernels; and what a replay needs beside its body.
_PROCESS = 384 * MIB
_REPLAY = 8 * MIB

# Where the kernel tells the limit of a control group: version 2, version 1. A number above this means none.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_UNLIMITED = 1 << 60


def container_bytes(files: tuple[Path, ...] = _LIMITS) -> int | None:
    """The memory that the container may use, None where nothing limits it."""
    for file in files:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None
    return None


def allowed_bytes(settings: Settings) -> dict[str, int]:
    """The most that each limit lets the tenants hold in memory together, by the settings that say so."""
    return {
        "the process itself": _PROCESS,
        "max_memory_bytes": settings.max_memory_bytes,
        # While a machine grows there are its frames and a larger copy of them.
        "max_table_frames, max_image_memory_bytes": min(
            settings.max_table_frames * FRAME_BYTES + settings.max_image_memory_bytes, settings.max_memory_bytes
        ),
        "replay_threads, body_queue_bytes": settings.replay_threads * (settings.body_queue_bytes + _REPLAY),
        "max_body_memory_bytes": settings.max_body_memory_bytes,
        "max_held_body_bytes": settings.max_held_body_bytes,
        "max_replays, spool_memory_bytes": settings.max_replays * (PIECE + settings.spool_memory_bytes),
    }


def warn_of_memory(settings: Settings, container: int | None) -> None:
    """Log a warning when what may be held is more than the container has: the kernel would end the process first."""
    parts = allowed_bytes(settings)
    total = sum(parts.values())
    if container is None or total <= container:
        return
    shown = "; ".join(f"{name}: {size // MIB} MiB" for name, size in parts.items())
    logger.warning(
        "the limits allow %d MiB in memory, the container has %d MiB and the kernel ends what takes more: lower the "
        "settings or raise the container's limit (%s)",
        total // MIB,
        container // MIB,
        shown,
    )
