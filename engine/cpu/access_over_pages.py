"""An access over one page or several: what the processor does with it as a whole, and in which order.

Pages are taken low page first, and the first one that does not allow its part ends the access: sub-page permissions
apply to each, and the exit's GPA is the base of a later page. Only where every page allows it must the
page-modification log have room for all of them; permission comes first. Only then does anything land: an access that
fails sets no accessed or dirty flag, in no page, and logs nothing.

This is for an access by GPA; ``instruction`` does the same for one by linear address. The pages of an access are
neighbours, but for one whose linear address was translated before (``trace.guest_virtual``): ``Machine.places`` has
where each of its pages is, and ``place`` is how everything here and in ``kvm`` goes from page to page.
"""

from engine.arch import exits
from engine.cpu import access_check, cached_check, ept, page_log, tlb
from engine.cpu.exit_qualification import nmi_unblocking
from engine.cpu.memory_slots import SMM, within
from engine.jit import kernel

PAGE = 4096


@kernel
def page_part(at, end):
    """Bytes of [at, end) that lie in the page of ``at``."""
    return min(end - at, PAGE - (at & (PAGE - 1)))


@kernel
def place(m, gpa, done):
    """GPA of byte ``done`` of an access that begins at ``gpa``: 0, or the first byte of one of its pages.

    Both in the address space of ``gpa``, if it is an address of one (``memory_slots``).
    """
    if done == 0 or m.places[0] != within(gpa):
        return gpa + done
    return m.places[((gpa & (PAGE - 1)) + done) >> 12] | (gpa & SMM)


@kernel
def offset_of(m, gpa, at):
    """Which byte of an access that begins at ``gpa`` is at ``at``, the beginning of one of its pages."""
    if at == gpa or m.places[0] != gpa:
        return at - gpa
    page = 1
    while page + 1 < m.places.shape[0] and m.places[page] != at:
        page += 1
    return (page << 12) - (gpa & (PAGE - 1))


@kernel
def decide(m, vcpu, gpa, size, how, trail):
    """Decide about ``size`` bytes at ``gpa``; changes nothing.

    Returns (reason, qualification, denied, at, source, stale): the first three as ``access_check.check`` does, for the
    page of ``at``, a full log for ``gpa``; ``source`` is how the last page was decided, ``stale`` 1 where a cached
    translation decided about any against the tables. ``trail`` is that of the last page.
    """
    source = cached_check.WALKED
    stale = 0
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        reason, qualification, denied = access_check.check(m, vcpu, at, part, how, trail)
        if tlb.modelled(m):
            reason, qualification, denied, source = cached_check.through_cache(
                m, vcpu, at, part, how, reason, qualification, denied, trail
            )
            stale |= 1 if source == cached_check.STALE else 0
        if reason != exits.NONE:
            return reason, qualification, denied, at, source, stale
        done += part
    mode = ept.mode_of(m, vcpu)
    if page_log.on(mode) and not log_fits(m, vcpu, mode, gpa, size, how, source, trail):
        return exits.PML_FULL, nmi_unblocking(how), 0, gpa, source, stale
    return exits.NONE, 0, 0, gpa, source, stale


@kernel
def log_fits(m, vcpu, mode, gpa, size, how, source, trail):
    """Whether the page-modification log has room for an access that every page of it allows.

    ``trail`` and ``source`` are those of its last page; they still are those of the only page afterwards.
    """
    if not page_log.on(mode):
        return True
    index = page_log.index_of(m, vcpu)
    one_page = page_part(gpa, gpa + size) == size
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        if not one_page:
            _, _, _, source = cached_check.check(m, vcpu, at, part, how, trail)
        if source == cached_check.WALKED:
            room, index = page_log.take(how, mode, index, trail)
            if not room:
                return False
        done += part
    return True


@kernel
def settle(m, vcpu, gpa, size, how, source, trail):
    """Leave behind what a successful access leaves: flags in the entries, the pages in the caches.

    ``source`` says how its last page was decided. Returns whether the last page's leaf is now dirty.
    """
    mode = ept.mode_of(m, vcpu)
    one_page = page_part(gpa, gpa + size) == size
    dirty = False
    done = 0
    while done < size:
        at = place(m, gpa, done)
        part = page_part(at, at + size - done)
        if not one_page:
            _, _, _, source = cached_check.check(m, vcpu, at, part, how, trail)
        if tlb.modelled(m) or page_log.on(mode):
            dirty = cached_check.finish(m, vcpu, mode, at, how, source, trail)
        else:
            dirty = access_check.set_flags(m, mode, how, trail)
        done += part
    return dirty
