"""How engine functions are compiled, and how they take many arrays at once."""

from engine.jit.arrays import Arrays, Kind, by_pointer
from engine.jit.kernels import COMPILED, intrinsic, kernel, position, short_kernel, stands_alone

__all__ = [
    "COMPILED",
    "Arrays",
    "Kind",
    "by_pointer",
    "intrinsic",
    "kernel",
    "position",
    "short_kernel",
    "stands_alone",
]
