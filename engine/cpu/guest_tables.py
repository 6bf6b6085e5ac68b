"""Where a linear address leads by the guest's own tables alone, as they are in guest memory now.

This is for whoever has addresses of a guest and wants its frames: traces and objects by linear address. The walk is
that of ``guest_paging``, as no access of a processor: nothing goes through EPT, no privilege is asked for, no flag is
set.
What the guest itself would take a page fault for, an entry that is not present or has a reserved bit, leads nowhere.
"""

from engine.arch import access as acc
from engine.arch import exits
from engine.cpu import guest_paging, instruction
from engine.jit import kernel

# In place of a GPA: the address leads nowhere. Bits 15:12 are the level of the entry to blame, 0 where the address is
# not canonical.
NOWHERE = 1 << 62
LEVEL_SHIFT = 12

LOOKS = acc.READ | acc.DEFAULT_LINEAR


@kernel
def locate(m, vcpu, space, linear, trail, steps):
    """GPA of a linear address under an address space, a value of CR3 or OWN_SPACE; or NOWHERE and the level.

    ``steps`` are those of ``guest_paging.walk``; no level of it is filled where the address is not canonical.
    """
    for level in range(steps.shape[0]):
        steps[level, 0] = 0
    steps[0, 1] = 0
    at = instruction.effective(m, vcpu, linear)
    if not instruction.canonical(m, vcpu, at):
        return NOWHERE
    reason, _, gpa, _, _ = guest_paging.walk(m, vcpu, space, at, LOOKS, guest_paging.BARE, trail, steps)
    if reason != exits.NONE:
        return NOWHERE | steps[0, 1] << LEVEL_SHIFT
    return gpa


@kernel
def locate_pages(m, vcpu, space, linear, frames, trail, steps):
    """Fill ``frames`` (int64) with the GPAs of consecutive pages from a page's first byte on.

    Returns how many were found; the next one, if there is one, has what ``locate`` says of it.
    """
    for page in range(frames.shape[0]):
        frames[page] = locate(m, vcpu, space, linear + (page << 12), trail, steps)
        if frames[page] >= NOWHERE:
            return page
    return frames.shape[0]
