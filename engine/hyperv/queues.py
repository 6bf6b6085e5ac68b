"""KVM's queues of ranges to flush: two for each vCPU, for itself and for the nested guest it runs, 16 places each.

A range is queued as the word of the list it came in. The word of all ones stands for everything; a request for the
4,096 pages from the last one looks the same and flushes everything too. Source: Linux 7.1, kvm_hv_flush_tlb and
kvm_hv_vcpu_flush_tlb.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.arch.hypercall import EVERYTHING
from engine.arch.words import signed, unsigned
from engine.cpu.frames import Words

PLACES = 16
OWN_QUEUE, NESTED_QUEUE = 0, 1

_COUNT = 0
_REQUEST = 1
_FIRST = 2


def enqueue(queues: Words, vcpu: int, which: int, words: Sequence[int] | None) -> None:
    """Queue a list, or everything where there is none or it does not leave a place free.

    Everything is not queued again when the queue is full: that it is full means that it is in it.
    """
    queue = queues[vcpu, which]
    count = int(queue[_COUNT])
    wanted = words if words is not None and 0 < len(words) < PLACES - count else (EVERYTHING,)
    for word in wanted:
        if count < PLACES:
            queue[_FIRST + count] = signed(word)
            count += 1
    queue[_COUNT] = count
    request(queues, vcpu)


def request(queues: Words, vcpu: int) -> None:
    """Have a vCPU look at the queue of its mode before it next enters its guest."""
    queues[vcpu, OWN_QUEUE, _REQUEST] = 1


def requested(queues: Words, vcpu: int) -> bool:
    """Whether it was told to."""
    return bool(queues[vcpu, OWN_QUEUE, _REQUEST])


def any_requested(queues: Words) -> bool:
    """Whether any vCPU was told to."""
    return bool(np.count_nonzero(queues[:, OWN_QUEUE, _REQUEST]))


def acknowledge(queues: Words, vcpu: int) -> None:
    """It looks."""
    queues[vcpu, OWN_QUEUE, _REQUEST] = 0


def contents(queues: Words, vcpu: int, which: int) -> tuple[int, ...]:
    """What is queued, first in first."""
    queue = queues[vcpu, which]
    return tuple(unsigned(word) for word in queue[_FIRST : _FIRST + int(queue[_COUNT])])


def purge(queues: Words, vcpu: int, which: int) -> None:
    """Forget what is queued."""
    queues[vcpu, which, _COUNT] = 0
