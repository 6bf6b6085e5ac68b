"""Faults of ``engine/cpu``. The guest's paging."""

from __future__ import annotations

from .mutant import Mutant
from .paths import DERIVED, GUEST_PAGING, named, plain

GUEST_PAGING_PY = "engine/cpu/guest_paging.py"
INSTRUCTION_PY = "engine/cpu/instruction.py"
CONTROL_REGISTERS_PY = "engine/cpu/control_registers.py"

MUTANTS = (
    Mutant(
        "guest-user-of-leaf",
        GUEST_PAGING_PY,
        "if not entry & guest.USER:",
        "if level == 1 and not entry & guest.USER:",
        "volume 3A, 4.6: a page is the user's if every entry says so",
        named(GUEST_PAGING, "page_is_the_users_if_every_entry_says_so"),
    ),
    Mutant(
        "guest-error-user",
        GUEST_PAGING_PY,
        "if m.rows[row, ctl.V_CPL] == 3:",
        "if m.rows[row, ctl.V_CPL] != 0:",
        "volume 3A, 4.7: U/S of the error code is CPL 3",
        named(GUEST_PAGING, "cpl_1_and_2_are_supervisor"),
    ),
    Mutant(
        "guest-error-fetch",
        GUEST_PAGING_PY,
        "if how & acc.ACCESS_MASK == acc.EXECUTE and (no_execute or cr4 & guest.CR4_SMEP):",
        "if how & acc.ACCESS_MASK == acc.EXECUTE and no_execute:",
        "volume 3A, 4.7: I/D of the error code with SMEP too",
        named(GUEST_PAGING, "fetch_is_reported_with_no_execute_or_smep"),
    ),
    Mutant(
        "guest-error-reserved",
        GUEST_PAGING_PY,
        "error = exceptions.PF_PRESENT | exceptions.PF_RESERVED",
        "error = exceptions.PF_RESERVED",
        "volume 3A, 4.7: RSVD comes with P",
        named(DERIVED, "guest_privileges"),
    ),
    Mutant(
        "guest-priority",
        GUEST_PAGING_PY,
        "if refused(m, vcpu, how, facts):",
        "if refused(m, vcpu, how, facts) and not writes(how):",
        "29.3.3.3: a page fault comes before anything about the page's GPA",
        plain("E14"),
    ),
    Mutant(
        "guest-no-execute-off",
        GUEST_PAGING_PY,
        "if not m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_EFER] & guest.EFER_NXE:",
        "if m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_EFER] == 0:",
        "volume 3A, 4.5: bit 63 is reserved without EFER.NXE",
        named(DERIVED, "write_protect_and_no_execute_are_switches"),
    ),
    Mutant(
        "guest-no-execute",
        GUEST_PAGING_PY,
        "return forbidden or facts & acc.LINEAR_EXECUTE_DISABLE != 0",
        "return forbidden",
        "volume 3A, 4.6: nothing is fetched from an execute-disable page",
        named(DERIVED, "guest_privileges"),
    ),
    Mutant(
        "guest-write-protect",
        GUEST_PAGING_PY,
        "return user_mode or m.rows[row, ctl.V_CR0] & guest.CR0_WP != 0",
        "return True",
        "volume 3A, 4.6: without CR0.WP supervisors write read-only pages",
        named(DERIVED, "write_protect_and_no_execute_are_switches"),
    ),
    Mutant(
        "guest-user-page",
        GUEST_PAGING_PY,
        "if user_mode and not user_page:",
        "if user_mode and not user_page and writes(how):",
        "volume 3A, 4.6: user mode sees user pages only",
        named(DERIVED, "guest_privileges"),
    ),
    Mutant(
        "guest-smep",
        GUEST_PAGING_PY,
        "forbidden = not user_mode and user_page and cr4 & guest.CR4_SMEP != 0",
        "forbidden = not user_mode and cr4 & guest.CR4_SMEP != 0",
        "volume 3A, 4.6: SMEP is about user pages",
        named(DERIVED, "guest_privileges"),
    ),
    Mutant(
        "guest-smap",
        GUEST_PAGING_PY,
        "if not user_mode and user_page and cr4 & guest.CR4_SMAP and not m.rows[row, ctl.V_RFLAGS] & guest.RFLAGS_AC:",
        "if not user_mode and user_page and cr4 & guest.CR4_SMAP:",
        "volume 3A, 4.6: RFLAGS.AC suspends SMAP",
        named(DERIVED, "guest_privileges"),
    ),
    Mutant(
        "guest-dirty-of-tables",
        GUEST_PAGING_PY,
        "if level == bottom and writes(how):",
        "if writes(how):",
        "volume 3A, 4.8: only the entry that maps the page has a dirty flag",
        named(GUEST_PAGING, "guest_flags_of_a_write"),
    ),
    Mutant(
        "guest-pdpte-index",
        GUEST_PAGING_PY,
        "entry = m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_PDPTE0 + (linear >> 30 & 3)]",
        "entry = m.rows[m.row_of[FIRST_VCPU_FRAME + vcpu], ctl.V_PDPTE0 + (linear >> 30 & 1)]",
        "volume 3A, 4.4: linear bits 31:30 choose the PDPTE",
        named(DERIVED, "k14_pdptes_loaded_by_mov_to_cr3"),
    ),
    Mutant(
        "guest-reserved-pml4e",
        GUEST_PAGING_PY,
        "return guest.LARGE",
        "return 0",
        "volume 3A, 4.5: bit 7 of a PML4E is reserved",
        named(GUEST_PAGING, "bit_7_of_a_guest_pml4e_is_reserved"),
    ),
    Mutant(
        "guest-canonical",
        INSTRUCTION_PY,
        "bits = guest.LINEAR_57 if paging == guest_paging.FIVE_LEVELS else guest.LINEAR_48",
        "bits = guest.LINEAR_57 if paging == guest_paging.FIVE_LEVELS else 49",
        "volume 3A, 4.5: bits 63:47 of a linear address are equal",
        named(DERIVED, "a_non_canonical_address_is_gp"),
    ),
    Mutant(
        "guest-pdpte-reserved",
        CONTROL_REGISTERS_PY,
        "if entry & guest.PRESENT and entry & (guest.RESERVED_PDPTE | high):",
        "if entry & (guest.RESERVED_PDPTE | high):",
        "volume 3A, 4.4.1: reserved bits count in present PDPTEs",
        named(DERIVED, "a_reserved_bit_in_a_pdpte_is_gp"),
    ),
)
