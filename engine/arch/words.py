"""64-bit words as the kernels hold them.

Compiled code works on ``int64``: mixing unsigned and signed integers turns into floating point there. A word keeps
its 64 bits; only its reading as a Python integer differs.
"""

import numpy as np

WORD = (1 << 64) - 1


def positions(count: int, start: int = 0) -> tuple[np.int64, ...]:
    """``count`` consecutive constants that kernels pass to each other.

    numba compiles a function once for each plain integer literal it is called with; an ``int64`` is just a number.
    """
    return tuple(np.int64(start + i) for i in range(count))


def signed(word: int) -> int:
    """The int64 that has the 64 bits of ``word``."""
    word &= WORD
    return word - (1 << 64) if word >> 63 else word


def unsigned(word: int) -> int:
    """The 64 bits of an int64 as a non-negative integer."""
    return int(word) & WORD
