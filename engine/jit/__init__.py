"""How engine functions are compiled, and how they take many arrays at once."""

from engine.jit.arrays import Arrays, Kind, by_pointer
from engine.jit.kernels import kernel, short_kernel, stands_alone

__all__ = ["Arrays", "Kind", "by_pointer", "kernel", "short_kernel", "stands_alone"]
