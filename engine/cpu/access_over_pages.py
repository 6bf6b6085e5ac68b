"""An access over one page or several: what the processor does with it as a whole, and in which order."""

from engine.cpu import page_log
from engine.cpu.cached_check import WALKED, check
from engine.jit import kernel

PAGE = 4096


@kernel
def page_part(at, end):
    """Bytes of [at, end) that lie in the page of ``at``."""
    return min(end - at, PAGE - (at & (PAGE - 1)))


@kernel
def log_fits(m, vcpu, mode, gpa, size, how, source, trail):
    """Whether the page-modification log has room for an access that every page of it allows.

    ``trail`` and ``source`` are those of its last page; they still are those of the only page afterwards.
    """
    if not page_log.on(mode):
        return True
    index = page_log.index_of(m, vcpu)
    one_page = page_part(gpa, gpa + size) == size
    at = gpa
    while at < gpa + size:
        part = page_part(at, gpa + size)
        if not one_page:
            _, _, _, source = check(m, vcpu, at, part, how, trail)
        if source == WALKED:
            room, index = page_log.take(how, mode, index, trail)
            if not room:
                return False
        at += part
    return True
