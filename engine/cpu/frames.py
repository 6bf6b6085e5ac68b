"""Host-physical table memory: 4-KByte frames of 512 words.

Everything a machine keeps (EPT, SPPT, bitmap layers, guest pages, vCPU records, its own registers) lives in frames.
A frame is reached through ``row_of``: a change under way writes a copy in a fresh row and leaves the published row
alone, so readers need no lock and giving a change up costs nothing.

Kernels never allocate: ``ample`` says whether one more access can be served from the frames and rows at hand.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from engine.arch.words import positions
from engine.jit import Arrays, Kind, by_pointer, kernel, position, short_kernel

WORDS = 512
FRAME_SIZE = 4096

# Frame kinds
FREE, STATE, VCPU, EPT, SPPT, LAYER, MEMORY, CLIENT, NESTED, SYMBOLS = positions(10)
KIND_NAMES = ("free", "state", "vcpu", "ept", "sppt", "layer", "memory", "client", "nested", "symbols")

# Frame 0 holds the machine's registers; frame 1 + k the record of the k-th vCPU, or the place kept for it.
STATE_FRAME, FIRST_VCPU_FRAME = positions(2)

# Positions in Machine.top
TOP_FREE = 0
TOP_SPARE = 1

# Frames and rows that one access can need at most: EPT and SPPT paths, layer paths, and the copies of all of them,
# for each of the up to 17 pages of a 64-KByte access, with one SPPT; and what each further SPPT adds, of which such an
# access touches two regions at most.
RESERVE = 640
RESERVE_PER_SPPT = 12

# Positions in Machine.caps
CAP_ARENA = 0
CAP_RESERVED_ADDRESS = 1
CAP_EPT_VPID = 2
CAP_SPP_EXECUTE_ONLY = 3
CAP_VCPUS = 4
CAP_KVM = 5  # choices of the profile (see ``kvm.choice_bits``)
CAP_SAVED_SHIFT = 6
CAP_FAST_PATH = 7
CAP_RMW_READS = 8
CAP_SECONDARY_ALLOWED = 9
CAP_TERTIARY_ALLOWED = 10
CAP_RESERVE = 11  # frames and rows that one access can need at most
CAP_SPPT_TREES = 12  # how many SPPTs there are when SPP is on
CAP_PLACES = 13  # frames that are kept for records of vCPUs still to come: neither free nor in use
CAPS = 16

# An access of 64 KBytes touches at most 17 pages.
MOST_PAGES = 18
NO_PLACE = np.int64(-1)

# A queue of flushes: how many, whether its vCPU was told, and up to 16 of them.
QUEUE_WORDS = 18

Words = NDArray[np.int64]

_INT64, _UINT8 = np.dtype(np.int64), np.dtype(np.uint8)


@by_pointer
class Machine(Arrays):
    """What kernels see of a machine.

    ``rows`` int64[n, 512]; ``row_of`` int64[frames] (-1: free); ``fresh`` uint8[frames] (1: this change owns the row);
    ``kind`` uint8[frames]; ``free`` and ``spare`` int64 stacks of frames and rows with heights in ``top``;
    ``caps`` int64[CAPS]; ``vcpu_of_id`` int64 (vCPU id to position, -1: none); ``slots`` int64[n, SLOT_WORDS] sorted
    by base GFN; ``cache`` int64[CACHE_WORDS], the fast path; ``tlb`` the translation cache, without rows where none
    is modelled (see ``cpu.tlb``); ``queues`` int64[records of vCPUs, 2, QUEUE_WORDS], flushes that vCPUs have not yet
    done (see ``hyperv.queues``): volatile like the cache; ``places`` int64[MOST_PAGES] where the pages of the access
    under way are, if they are no neighbours (see ``cpu.access_over_pages``), else NO_PLACE comes first; ``lost``
    int64[1], the first page that this change found missing in the file behind its slot (see ``cpu.memory_files``).
    """

    kinds: ClassVar = {
        "rows": Kind(_INT64, 2),
        "row_of": Kind(_INT64, 1),
        "fresh": Kind(_UINT8, 1),
        "kind": Kind(_UINT8, 1),
        "free": Kind(_INT64, 1),
        "spare": Kind(_INT64, 1),
        "top": Kind(_INT64, 1),
        "caps": Kind(_INT64, 1),
        "vcpu_of_id": Kind(_INT64, 1),
        "slots": Kind(_INT64, 2),
        "cache": Kind(_INT64, 1),
        "tlb": Kind(_INT64, 2),
        "queues": Kind(_INT64, 3),
        "places": Kind(_INT64, 1),
        "lost": Kind(_INT64, 1),
    }

    rows: Words
    row_of: Words
    fresh: NDArray[np.uint8]
    kind: NDArray[np.uint8]
    free: Words
    spare: Words
    top: Words
    caps: Words
    vcpu_of_id: Words
    slots: Words
    cache: Words
    tlb: Words
    queues: Words
    places: Words
    lost: Words


@kernel
def read_word(m, frame, index):
    """Word ``index`` of ``frame``."""
    return m.rows[position(m.row_of[position(frame)]), position(index)]


@kernel
def own(m, frame):
    """Make the frame writable in this change and return its row."""
    if m.fresh[frame] == 0:
        m.top[TOP_SPARE] -= 1
        row = m.spare[m.top[TOP_SPARE]]
        old = m.row_of[frame]
        for i in range(WORDS):
            m.rows[row, i] = m.rows[old, i]
        m.row_of[frame] = row
        m.fresh[frame] = 1
    return m.row_of[frame]


@kernel
def write_word(m, frame, index, word):
    """Store a word; a word that is already there costs no copy."""
    if read_word(m, frame, index) != word:
        m.rows[own(m, frame), index] = word


@kernel
def new_frame(m, kind):
    """A zeroed frame from the free list."""
    m.top[TOP_FREE] -= 1
    frame = m.free[m.top[TOP_FREE]]
    m.top[TOP_SPARE] -= 1
    row = m.spare[m.top[TOP_SPARE]]
    for i in range(WORDS):
        m.rows[row, i] = 0
    m.row_of[frame] = row
    m.fresh[frame] = 1
    m.kind[frame] = kind
    return frame


def place_frame(m: Machine, frame: int, kind: np.int64) -> None:
    """A zeroed frame at a number that was kept for it."""
    m.top[TOP_SPARE] -= 1
    row = m.spare[m.top[TOP_SPARE]]
    m.rows[row] = 0
    m.row_of[frame], m.fresh[frame], m.kind[frame] = row, 1, kind


def new_frames(m: Machine, kind: np.int64, count: int) -> Words:
    """So many frames from the free list, whatever their rows hold."""
    taken: Words = m.free[m.top[TOP_FREE] - count : m.top[TOP_FREE]].copy()
    rows = m.spare[m.top[TOP_SPARE] - count : m.top[TOP_SPARE]]
    m.row_of[taken], m.fresh[taken], m.kind[taken] = rows, 1, kind
    m.top[:] -= count
    return taken


def free_frames(m: Machine, gone: Words) -> None:
    """Return frames to the free list."""
    m.row_of[gone], m.fresh[gone], m.kind[gone] = -1, 0, FREE
    m.free[m.top[TOP_FREE] : m.top[TOP_FREE] + len(gone)] = gone
    m.top[TOP_FREE] += len(gone)


@kernel
def free_frame(m, frame):
    """Return a frame to the free list."""
    m.row_of[frame] = -1
    m.fresh[frame] = 0
    m.kind[frame] = FREE
    m.free[m.top[TOP_FREE]] = frame
    m.top[TOP_FREE] += 1


@short_kernel
def settle(m, before, replaced):
    """End a change: no row is its own any more.

    ``before`` is ``row_of`` of the state that it began with; ``replaced`` int64[len(before)] takes the rows that only
    that state shows. Returns how many of these there are, and how many rows only the new state shows.
    """
    gone, come = 0, 0
    for frame in range(m.row_of.shape[0]):
        m.fresh[frame] = 0
        now = m.row_of[frame]
        old = before[frame] if frame < before.shape[0] else np.int64(-1)
        if now != old:
            if old >= 0:
                replaced[gone] = old
                gone += 1
            if now >= 0:
                come += 1
    return gone, come


@kernel
def ample(m):
    """Whether one more access can be served without growing."""
    return m.top[TOP_FREE] >= m.caps[CAP_RESERVE] and m.top[TOP_SPARE] >= m.caps[CAP_RESERVE]


@kernel
def blank(m, frame):
    """Whether every word of a frame is 0; from the end, for what is cleared in order to be found out late."""
    row = m.row_of[frame]
    last = WORDS - 1
    while last >= 0 and m.rows[row, last] == 0:
        last -= 1
    return last < 0


def records(m: Machine) -> int:
    """How many records of vCPUs there are: one for each vCPU, the first in any case."""
    return len(m.queues)


def in_use(m: Machine) -> int:
    """How many frames there are that hold something."""
    return len(m.row_of) - int(m.top[TOP_FREE]) - int(m.caps[CAP_PLACES])


@kernel
def address_of(m, frame):
    """Host-physical address of a frame."""
    return m.caps[CAP_ARENA] + (frame << 12)
