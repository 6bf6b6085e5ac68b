"""The translation cache: the one the architecture has (SDM vol. 3C, 29.4), on with ``translation_cache: model``.

An entry remembers a translation of one 4-KByte page, or of its part of a larger page, with everything the access
decision needs: the AND of the EPT rights, the leaf, the sub-page permission vector if one was read. An entry that
sub-page permissions granted still says that the page is not writable, and every write to it asks the vector again.

Three kinds, tagged as the manual tags them, and all by the vCPU whose cache it is:

physical   EPT root                            from GPA
combined   EPT root, VPID, PCID or global      from linear address, through the guest's paging and EPT
linear     VPID, PCID or global                from linear address, with EPT off

An entry also says for which nested guest it was made, by VM id and VP id, and under which second-level root of the
guest hypervisor; one with a linear address by which page tables. Nothing is looked up by roots of the guest hypervisor
and page tables, but hypercalls name them.

Only successful accesses leave entries, so nothing is remembered of entries that are not present or misconfigured. The
whole cache is volatile. It is a table int64[1 + ENTRIES, ENTRY_WORDS], without rows where the cache is off; row 0 is
the generation to which live entries belong and the clock of the replacement.
"""

import numpy as np

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import ept as bits
from engine.arch import paging as guest
from engine.arch.words import positions
from engine.cpu import ept
from engine.cpu.frames import FIRST_VCPU_FRAME, read_word
from engine.jit import kernel

WAYS = 8
SETS = 512
ENTRIES = SETS * WAYS
(
    E_GENERATION,
    E_KIND,
    E_SPACE,
    E_ROOT,
    E_NESTED,
    E_PAGE,
    E_FRAME,
    E_RIGHTS,
    E_LEAF,
    E_VECTOR,
    E_FACTS,
    E_NESTED_VM,
    E_ADDRESS_SPACE,
    E_NESTED_ROOT,
) = positions(14)
ENTRY_WORDS = 14

# Row 0
GENERATION, CLOCK = positions(2)

# E_KIND: bits 7:0 the kind, 31:8 the vCPU's position
PHYSICAL, COMBINED, LINEAR = positions(3, 1)
KIND_MASK = 0xFF
VCPU_SHIFT = 8

# E_SPACE: bits 15:0 VPID, 27:16 PCID
PCID_SHIFT = 16

# E_RIGHTS: rights as in an entry, and in 19:16 the level of the EPT leaf, in bit 20 write permission above it
LEVEL_SHIFT = 16
UPPER_SHIFT = 20
RIGHTS_MASK = bits.RIGHTS | bits.USER_EXECUTE

# E_FACTS: bits 3:0 what the guest's paging says of the page, as the linear bits of an access; 9:4 the number of address
# bits within it
GUEST_SIZE_AT = 4
GUEST_SIZE_MASK = 63
VECTOR_READ = 1 << 10
GUEST_DIRTY = 1 << 11
GUEST_GLOBAL = 1 << 12
GUEST_UPPER_WRITABLE = 1 << 13
GUEST_LEAF_WRITABLE = 1 << 14
GUEST_UNVERIFIED = 1 << 15

# In place of a root, VPID, PCID, page or vCPU: any of them. No such thing has this value.
EVERY = np.int64(-(1 << 62))
GLOBALS_TOO, GLOBALS_STAY = positions(2)
NO_SPACE = np.int64(0)
MISSING = np.int64(0)


def new_table() -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """An empty cache."""
    table = np.zeros((1 + ENTRIES, ENTRY_WORDS), dtype=np.int64)
    table[0, GENERATION] = 1
    return table


def no_table() -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The cache of a machine that models none."""
    return np.zeros((0, ENTRY_WORDS), dtype=np.int64)


@kernel
def modelled(m):
    """Whether the machine has a translation cache."""
    return m.tlb.shape[0] > 0


@kernel
def vpid_of(m, vcpu):
    """The current VPID of a vCPU: 0 without the control."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    on = m.rows[row, ctl.V_PRIMARY] & ctl.PRIMARY_SECONDARY and m.rows[row, ctl.V_SECONDARY] & ctl.SECONDARY_VPID
    return m.rows[row, ctl.V_VPID] & ctl.VPID_MASK if on else 0


@kernel
def pcid_of(m, vcpu):
    """The current PCID of a vCPU: 0 without CR4.PCIDE."""
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    return m.rows[row, ctl.V_CR3] & guest.CR3_PCID if m.rows[row, ctl.V_CR4] & guest.CR4_PCIDE else 0


@kernel
def space_of(m, vcpu):
    """The current VPID and PCID as a tag."""
    return vpid_of(m, vcpu) | pcid_of(m, vcpu) << PCID_SHIFT


@kernel
def root_of(m, vcpu):
    """The tag for EPT: bits 51:12 of the current EPTP."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_EPTP) & bits.ADDRESS


@kernel
def nested_of(m, vcpu):
    """The tag for nesting: whatever identifies the nested guest that runs, 0 for none."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_NESTED)


@kernel
def nested_vm_of(m, vcpu):
    """The other half of that tag: the VM id."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_NESTED_VM)


@kernel
def address_space_of(m, vcpu):
    """The page tables in use: CR3's address bits, which leave the PCID out."""
    return read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CR3) & guest.ADDRESS


@kernel
def first_way(vcpu, page):
    """Row of the first way of the set that a page belongs to."""
    return 1 + ((page ^ page >> 9 ^ page >> 18 ^ vcpu << 3) & (SETS - 1)) * WAYS


@kernel
def live(m, row):
    """Whether a row holds an entry."""
    return m.tlb[row, E_GENERATION] == m.tlb[0, GENERATION]


@kernel
def same_space(m, row, space):
    """Whether an entry may serve an address space: its VPID, and its PCID unless it is global."""
    own = m.tlb[row, E_SPACE]
    mask = ctl.VPID_MASK if m.tlb[row, E_FACTS] & GUEST_GLOBAL else -1
    return (own ^ space) & mask == 0


@kernel
def translates(m, row, vcpu, kind, page):
    """Whether a row holds an entry that translates a page for a vCPU as it is; ``page`` is as ``find`` has it."""
    if not live(m, row) or m.tlb[row, E_PAGE] != page or m.tlb[row, E_KIND] != kind | vcpu << VCPU_SHIFT:
        return False
    if m.tlb[row, E_NESTED] != nested_of(m, vcpu) or m.tlb[row, E_NESTED_VM] != nested_vm_of(m, vcpu):
        return False
    root = NO_SPACE if kind == LINEAR else root_of(m, vcpu)
    space = NO_SPACE if kind == PHYSICAL else space_of(m, vcpu)
    return m.tlb[row, E_ROOT] == root and same_space(m, row, space)


@kernel
def find(m, vcpu, kind, page):
    """Row of the entry that translates a page for a vCPU as it is, MISSING if there is none.

    ``page`` is the GFN for a physical entry, else the linear address's bits 63:12.
    """
    first = first_way(vcpu, page)
    for row in range(first, first + WAYS):
        if translates(m, row, vcpu, kind, page):
            return row
    return MISSING


@kernel
def room(m, vcpu, page):
    """Row for an entry of a page that has none: a free one of its set, or the next in turn."""
    first = first_way(vcpu, page)
    for way in range(first, first + WAYS):
        if not live(m, way):
            return way
    m.tlb[0, CLOCK] += 1
    return first + (m.tlb[0, CLOCK] & (WAYS - 1))


@kernel
def place(m, vcpu, kind, page):
    """Row for a new entry: the one it replaces, or one with room for it."""
    row = find(m, vcpu, kind, page)
    return row if row != MISSING else room(m, vcpu, page)


@kernel
def remember(m, vcpu, kind, page, frame, facts, trail):
    """Remember a translation to GFN ``frame`` that just served an access; ``trail`` holds its EPT walk.

    ``facts`` is what the guest's paging says of it, as in E_FACTS.
    """
    fill(m, place(m, vcpu, kind, page), vcpu, kind, page, frame, facts, trail)


@kernel
def fill(m, row, vcpu, kind, page, frame, facts, trail):
    """Make a row the entry that ``remember`` is about."""
    rights = np.int64(RIGHTS_MASK)
    upper = np.int64(bits.WRITE)
    count = trail[ept.TRAIL_COUNTS, 0]
    for at in range(count):
        rights &= trail[at, 3]
        if at < count - 1:
            upper &= trail[at, 3]
    m.tlb[row, E_GENERATION] = m.tlb[0, GENERATION]
    m.tlb[row, E_KIND] = kind | vcpu << VCPU_SHIFT
    m.tlb[row, E_SPACE] = NO_SPACE if kind == PHYSICAL else space_of(m, vcpu)
    m.tlb[row, E_ROOT] = NO_SPACE if kind == LINEAR else root_of(m, vcpu)
    m.tlb[row, E_NESTED] = nested_of(m, vcpu)
    m.tlb[row, E_NESTED_VM] = nested_vm_of(m, vcpu)
    m.tlb[row, E_NESTED_ROOT] = read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_NESTED_ROOT)
    m.tlb[row, E_ADDRESS_SPACE] = NO_SPACE if kind == PHYSICAL else address_space_of(m, vcpu)
    m.tlb[row, E_PAGE] = page
    m.tlb[row, E_FRAME] = frame
    level = trail[count - 1, 0] if count else 0
    m.tlb[row, E_RIGHTS] = rights | level << LEVEL_SHIFT | (upper >> 1) << UPPER_SHIFT
    m.tlb[row, E_LEAF] = trail[count - 1, 3] if count else 0
    m.tlb[row, E_VECTOR] = 0
    if trail[ept.TRAIL_COUNTS, 1] == 4:
        m.tlb[row, E_VECTOR] = trail[ept.TRAIL_SPPT + 3, 3]
        facts |= VECTOR_READ
    m.tlb[row, E_FACTS] = facts


@kernel
def combine(m, vcpu, page, frame, facts):
    """Remember a combined translation to GFN ``frame`` whose EPT half a physical entry gave."""
    source = find(m, vcpu, PHYSICAL, frame)
    if source != MISSING:
        merge(m, place(m, vcpu, COMBINED, page), source, vcpu, page, facts)


@kernel
def merge(m, row, source, vcpu, page, facts):
    """Make a row the combined entry whose EPT half is that of the row ``source``."""
    for word in range(ENTRY_WORDS):
        m.tlb[row, word] = m.tlb[source, word]
    m.tlb[row, E_KIND] = COMBINED | vcpu << VCPU_SHIFT
    m.tlb[row, E_SPACE] = space_of(m, vcpu)
    m.tlb[row, E_ADDRESS_SPACE] = address_space_of(m, vcpu)
    m.tlb[row, E_PAGE] = page
    m.tlb[row, E_FACTS] = facts | m.tlb[source, E_FACTS] & VECTOR_READ


@kernel
def drop(m, row):
    """Empty a row."""
    m.tlb[row, E_GENERATION] = 0


# Removals


@kernel
def flush(m):
    """Remove everything, as the hypervisor's own changes of its tables do."""
    if modelled(m):
        m.tlb[0, GENERATION] += 1


@kernel
def remove_ept(m, vcpu, root):
    """INVEPT: physical and combined entries of a root (bits 51:12 of an EPTP), or of EVERY one."""
    for row in range(1, m.tlb.shape[0]):
        kind = m.tlb[row, E_KIND]
        if kind & KIND_MASK == LINEAR or (vcpu != EVERY and kind >> VCPU_SHIFT != vcpu):
            continue
        if root == EVERY or m.tlb[row, E_ROOT] == root:
            drop(m, row)


@kernel
def remove_linear(m, vcpu, vpid, pcid, linear, globals_, nested):
    """The common form of what removes linear and combined entries: those of a VPID (EVERY: all but 0) and PCID.

    With an address, only those whose page, as large as the guest has it, contains it. Global entries have every PCID
    under GLOBALS_TOO and are spared under GLOBALS_STAY. ``nested`` and ``vcpu`` restrict it unless EVERY.
    """
    for row in range(1, m.tlb.shape[0]):
        kind = m.tlb[row, E_KIND]
        if kind & KIND_MASK == PHYSICAL or (vcpu != EVERY and kind >> VCPU_SHIFT != vcpu):
            continue
        if nested != EVERY and m.tlb[row, E_NESTED] != nested:
            continue
        facts = m.tlb[row, E_FACTS]
        own_vpid = m.tlb[row, E_SPACE] & ctl.VPID_MASK
        if (own_vpid == 0) if vpid == EVERY else (own_vpid != vpid):
            continue
        if facts & GUEST_GLOBAL:
            if globals_ == GLOBALS_STAY:
                continue
        elif pcid != EVERY and m.tlb[row, E_SPACE] >> PCID_SHIFT != pcid:
            continue
        if linear != EVERY:
            shift = (facts >> GUEST_SIZE_AT) & GUEST_SIZE_MASK
            if (m.tlb[row, E_PAGE] << 12) >> shift != linear >> shift:
                continue
        drop(m, row)


@kernel
def remove_vpid(m, vcpu, vpid, globals_):
    """INVVPID 1, 2 (EVERY) and 3."""
    remove_linear(m, vcpu, vpid, EVERY, EVERY, globals_, EVERY)


@kernel
def remove_address(m, vcpu, vpid, pcid, linear):
    """INVVPID 0 with EVERY PCID; INVLPG with the current VPID and PCID: globals go too."""
    remove_linear(m, vcpu, vpid, pcid, linear, GLOBALS_TOO, EVERY)


@kernel
def invlpg(m, vcpu, linear):
    """INVLPG by the guest."""
    remove_address(m, vcpu, vpid_of(m, vcpu), pcid_of(m, vcpu), linear)


@kernel
def invpcid(m, vcpu, kind, pcid, linear):
    """INVPCID by the guest: 0 one address of a PCID, 1 one PCID, 2 everything, 3 everything but globals."""
    vpid = vpid_of(m, vcpu)
    if kind == 0:
        remove_linear(m, vcpu, vpid, pcid, linear, GLOBALS_STAY, EVERY)
    elif kind == 1:
        remove_linear(m, vcpu, vpid, pcid, EVERY, GLOBALS_STAY, EVERY)
    else:
        remove_vpid(m, vcpu, vpid, GLOBALS_TOO if kind == 2 else GLOBALS_STAY)


@kernel
def load_cr3(m, vcpu):
    """MOV to CR3 by the guest: the current PCID's entries but the global ones."""
    remove_linear(m, vcpu, vpid_of(m, vcpu), pcid_of(m, vcpu), EVERY, GLOBALS_STAY, EVERY)


@kernel
def transition(m, vcpu):
    """VM entry or exit: without VPIDs nothing from linear addresses survives it."""
    if modelled(m) and vpid_of(m, vcpu) == 0:
        remove_linear(m, vcpu, NO_SPACE, EVERY, EVERY, GLOBALS_TOO, EVERY)


@kernel
def violated(m, vcpu, gpa, linear):
    """An EPT violation: entries that translate its GPA under the current root, and the linear address if there is one.

    ``linear`` is EVERY for an access without one.
    """
    row = find(m, vcpu, PHYSICAL, gpa >> 12)
    if row != MISSING:
        drop(m, row)
    if linear != EVERY:
        row = find(m, vcpu, COMBINED, linear >> 12)
        if row != MISSING:
            drop(m, row)


@kernel
def linear_bits(facts):
    """What the guest's paging says of a page, in its place in the word of an access."""
    how = (facts & 15) << acc.LINEAR_SHIFT
    return how | acc.UNVERIFIED_PAGING if facts & GUEST_UNVERIFIED else how
