"""Loads of CR3 by the guest, as far as they touch memory and translations (SDM vol. 3A, 4.4.1 and 4.10.4.1).

With PAE paging the load reads the four page-directory-pointer entries into registers: reads of guest memory through
EPT, without a linear address and never counted as writes. Otherwise nothing is read; the next access finds out.
"""

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import exceptions, exits
from engine.arch import paging as guest
from engine.cpu import guest_paging, tlb
from engine.cpu.frames import CAP_RESERVED_ADDRESS, FIRST_VCPU_FRAME, write_word
from engine.cpu.memory_slots import space_of
from engine.jit import kernel

LOAD_PDPTE = acc.READ | acc.PAGING_READ << acc.KIND_SHIFT
PDPTES = 4
ENTRY_SIZE = 8


@kernel
def load_pdptes(m, vcpu, cr3, trail):
    """Read the PDPTEs that CR3 names into the registers; returns (reason, value, gpa) as ``move_to_cr3`` does.

    Nothing is loaded unless all four are in order.
    """
    table = cr3 & guest.CR3_PAE_TABLE
    space = space_of(m, vcpu)
    for i in range(PDPTES):
        slot = table + i * ENTRY_SIZE
        reason, q, _ = guest_paging.touch(m, vcpu, slot, ENTRY_SIZE, LOAD_PDPTE, guest_paging.EXECUTE, trail)
        if reason != exits.NONE:
            return reason, q, slot
        entry = guest_paging.read_entry(m, slot | space, ENTRY_SIZE)
        high = guest.EXECUTE_DISABLE | guest.RESERVED_ABOVE_52 | m.caps[CAP_RESERVED_ADDRESS]
        if entry & guest.PRESENT and entry & (guest.RESERVED_PDPTE | high):
            return -exceptions.GENERAL_PROTECTION, 0, slot
    for i in range(PDPTES):
        entry = guest_paging.read_entry(m, table + i * ENTRY_SIZE | space, ENTRY_SIZE)
        write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_PDPTE0 + i, entry)
    return exits.NONE, 0, 0


@kernel
def move_to_cr3(m, vcpu, value, trail):
    """MOV to CR3: returns (reason, value, gpa), reason as that of an access: 0, an exit, or minus an exception vector.

    Translations of the PCID go, unless CR4.PCIDE lets bit 63 of the operand keep them.
    """
    row = m.row_of[FIRST_VCPU_FRAME + vcpu]
    keep = m.rows[row, ctl.V_CR4] & guest.CR4_PCIDE != 0 and value & guest.CR3_KEEP != 0
    cr3 = value & ~guest.CR3_KEEP if keep else value
    paging = guest_paging.mode_of(m, vcpu)
    if paging >= guest_paging.FOUR_LEVELS:
        if cr3 & (guest.CR3_RESERVED_HIGH | m.caps[CAP_RESERVED_ADDRESS]):
            return -exceptions.GENERAL_PROTECTION, 0, 0
    else:
        cr3 &= guest_paging.LOW_32
    if paging == guest_paging.PAE:
        reason, q, slot = load_pdptes(m, vcpu, cr3, trail)
        if reason != exits.NONE:
            return reason, q, slot
    write_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CR3, cr3)
    if tlb.modelled(m) and not keep:
        tlb.load_cr3(m, vcpu)
    return exits.NONE, 0, 0
