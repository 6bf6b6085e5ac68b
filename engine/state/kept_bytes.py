"""Bytes of any length in the frames of a machine: durable, counted and given up with everything else that it keeps.

An index frame has a link to the next one in its last word, and before it the numbers of up to 511 frames of content.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.cpu import frames
from engine.cpu.frames import FRAME_SIZE, WORDS, Machine
from engine.state.frame_store import Draft

_LISTED = WORDS - 1


def keep(draft: Draft, kind: np.int64, data: bytes) -> int:
    """Frames of a kind that hold ``data``; returns the first index. Raises LimitExceeded beyond the machine's limit."""
    pages = -(-len(data) // FRAME_SIZE)
    indices = max(1, -(-pages // _LISTED))
    draft.ensure(pages + indices)
    m = draft.machine
    taken = frames.new_frames(m, kind, pages + indices)
    index, content = taken[:indices], taken[indices:]
    words = np.zeros((pages, WORDS), dtype=np.int64)
    words.view(np.uint8).reshape(-1)[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    m.rows[m.row_of[content]] = words
    listed = np.zeros((indices, WORDS), dtype=np.int64)
    numbers = np.zeros(indices * _LISTED, dtype=np.int64)
    numbers[:pages] = content
    listed[:, :_LISTED] = numbers.reshape(indices, _LISTED)
    listed[:-1, _LISTED] = index[1:]
    m.rows[m.row_of[index]] = listed
    return int(index[0])


def read(m: Machine, first: int, size: int) -> bytes:
    """The bytes below an index."""
    _, content = _frames(m, first)
    return m.rows[m.row_of[content]].tobytes()[:size]


def drop(m: Machine, first: int) -> None:
    """Free the frames of an index."""
    for part in _frames(m, first):
        frames.free_frames(m, part)


def _frames(m: Machine, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indices, frames of content)."""
    indices, parts = [], []
    while first:
        words = m.rows[m.row_of[first]]
        indices.append(first)
        parts.append(words[:_LISTED][words[:_LISTED] > 0])
        first = int(words[_LISTED])
    return np.array(indices, dtype=np.int64), np.concatenate(parts)
