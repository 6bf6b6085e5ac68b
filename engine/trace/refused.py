"""Records that the fast path knows to be refused: one after the other, they are only counted and listed.

A trace that tramples on what is protected has millions of them. Whatever else a refused write may bring about is left
to ``replay.run_record``: a caller who decides about it, a nested guest that it passes by, a log that is told of it.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import exits
from engine.arch.controls import V_GUEST_MODE
from engine.cpu import fastpath
from engine.cpu.frames import FIRST_VCPU_FRAME, read_word
from engine.jit import kernel, stands_alone
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm import vcpu_run
from engine.trace.serving import count_of, record_at, served_head


@kernel
def count_refused(m, run, gvas, start, base, seen, log, used, tally):
    """Count and list plain writes that are known to be refused, from record ``start`` on, as long as there are, the log
    has room and who writes stays the same; returns the position of the first other one. Arguments as of ``replay``.
    """
    stands_alone()
    count = count_of(run)
    gpa, word = record_at(run, start)
    head = (word & seen) >> 16
    if not served_head(m.vcpu_of_id, head) or head & 0xFFFF != acc.WRITE:
        return start
    if read_word(m, FIRST_VCPU_FRAME + m.vcpu_of_id[head >> 16], V_GUEST_MODE):
        return start
    i, row = start, used[0]
    last = log.shape[0] - 2 * vcpu_run.MAX_EXITS - 2
    while i < count and row <= last:
        gpa, word = record_at(run, i)
        if (word & seen) >> 16 != head or word & 0xFFFF == 0:
            break
        q, denied = fastpath.denial(m, gpa, word & 0xFFFF)
        if q == 0:
            break
        log[row, vcpu_run.EXIT_INDEX] = base + i
        log[row, vcpu_run.EXIT_GPA] = gpa
        log[row, vcpu_run.EXIT_RECORD] = word
        log[row, vcpu_run.EXIT_GVA] = gvas[i] if gvas.shape[0] else np.int64(0)
        log[row, vcpu_run.EXIT_QUALIFICATION] = q
        log[row, vcpu_run.EXIT_REASON] = exits.EPT_VIOLATION | res.VIOLATION << 16
        log[row, vcpu_run.EXIT_DENIED] = denied
        log[row, vcpu_run.EXIT_AT] = gpa
        row += 1
        i += 1
    done = i - start
    used[0] = row
    for counter in (reg.EPT_VIOLATION, reg.VIOLATIONS, reg.PAGE_GRANULAR, reg.WRITES):
        tally[counter] += done
    return i
