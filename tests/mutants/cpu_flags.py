"""Faults of ``engine/cpu``. Flags, the log, exceptions."""

from __future__ import annotations

from .mutant import Mutant
from .paths import ACCESS_CHECK, LOG, named, plain

ACCESS_CHECK_PY = "engine/cpu/access_check.py"
PAGE_LOG_PY = "engine/cpu/page_log.py"
VE_PY = "engine/cpu/ve.py"

MUTANTS = (
    Mutant(
        "flags-dirty-of-tables",
        ACCESS_CHECK_PY,
        "if row == last and wants(how, mode) & bits.WRITE:",
        "if wants(how, mode) & bits.WRITE:",
        "29.3.5: only the leaf has a dirty flag",
        named(ACCESS_CHECK, "flags_of_every_entry"),
    ),
    Mutant(
        "flags-dirty-by-read",
        ACCESS_CHECK_PY,
        "if row == last and wants(how, mode) & bits.WRITE:",
        "if row == last:",
        "29.3.5: a read sets no dirty flag",
        named(LOG, "flags_of_the_leaf"),
    ),
    Mutant(
        "flags-accessed-of-leaf",
        ACCESS_CHECK_PY,
        "for row in range(count):",
        "for row in range(last, count):",
        "29.3.5: every entry used gets its accessed flag",
        named(ACCESS_CHECK, "flags_of_every_entry"),
    ),
    Mutant(
        "log-accessed-flag",
        PAGE_LOG_PY,
        "flags = flags or not trail[row, 3] & bits.ACCESSED",
        "flags = flags or not trail[row, 3] & bits.RIGHTS",
        "29.3.6: room is needed for an accessed flag too",
        plain("F18"),
    ),
    Mutant(
        "log-entry-512",
        PAGE_LOG_PY,
        "if flags and not 0 <= index < LOG_ENTRIES:",
        "if flags and not 0 <= index <= LOG_ENTRIES:",
        "29.3.6: an index above 511 is a full log",
        named(LOG, "a_full_log_stops_the_access_before_it_happens"),
    ),
    Mutant(
        "log-room-of-pages",
        PAGE_LOG_PY,
        "return True, (index - 1) & INDEX_MASK if dirty else index",
        "return True, index",
        "29.3.6: each page takes an entry",
        named(LOG, "two_pages_need_two_entries"),
    ),
    Mutant(
        "log-page-offset",
        PAGE_LOG_PY,
        "host_physical_memory.write(m, log, index, gpa & ~PAGE_OFFSET)",
        "host_physical_memory.write(m, log, index, gpa)",
        "29.3.6: an entry has bits 11:0 clear",
        named(LOG, "a_page_is_logged_when_it_becomes_dirty"),
    ),
    Mutant(
        "log-every-write",
        PAGE_LOG_PY,
        "dirty = access_rights.wants(how, mode) & bits.WRITE != 0 and not trail[count - 1, 3] & bits.DIRTY",
        "dirty = access_rights.wants(how, mode) & bits.WRITE != 0",
        "29.3.6: a page is logged when its dirty flag goes from 0 to 1",
        named(LOG, "a_page_is_logged_when_it_becomes_dirty"),
    ),
    Mutant(
        "log-index-width",
        PAGE_LOG_PY,
        "write_word(m, frame, ctl.V_PML_INDEX, (index - 1) & INDEX_MASK)",
        "write_word(m, frame, ctl.V_PML_INDEX, index - 1)",
        "25.6.15: the index has 16 bits",
        named(LOG, "a_full_log_stops_the_access_before_it_happens"),
    ),
    Mutant(
        "log-needs-flags",
        PAGE_LOG_PY,
        "LOGGING = ept.MODE_PML | ept.MODE_ACCESSED_DIRTY",
        "LOGGING = ept.MODE_PML",
        "29.3.6: nothing is logged without EPTP[6]",
        named(LOG, "without_flags_or_control_nothing_is_logged"),
    ),
    Mutant(
        "ve-deciding-entry",
        VE_PY,
        "if count == 0 or trail[count - 1, 3] & bits.SUPPRESS_VE:",
        "if count == 0 or trail[0, 3] & bits.SUPPRESS_VE:",
        "26.5.7.1: the last entry read decides",
        plain("F09"),
    ),
    Mutant(
        "ve-area-busy",
        VE_PY,
        "return host_physical_memory.read(m, area_of(m, vcpu), ve_area.WORD_REASON) & ve_area.BUSY == 0",
        "return True",
        "26.5.7.1: no conversion while the area is busy",
        plain("F12"),
    ),
    Mutant(
        "ve-real-mode",
        VE_PY,
        "if not read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_CR0) & guest.CR0_PE:",
        "if not read_word(m, FIRST_VCPU_FRAME + vcpu, ctl.V_PRIMARY):",
        "26.5.7.1: CR0.PE must be 1",
        named(LOG, "no_exception_in_real_mode_nor_in_event_delivery_nor_from_tracing"),
    ),
    Mutant(
        "ve-delivery",
        VE_PY,
        "if not ept.mode_of(m, vcpu) & ept.MODE_VE or how & (acc.DELIVERY | acc.ASYNCHRONOUS):",
        "if not ept.mode_of(m, vcpu) & ept.MODE_VE or how & acc.ASYNCHRONOUS:",
        "26.5.7.1: not while an event is delivered",
        named(LOG, "no_exception_in_real_mode_nor_in_event_delivery_nor_from_tracing"),
    ),
    Mutant(
        "ve-physical-address",
        VE_PY,
        "host_physical_memory.write(m, area, ve_area.WORD_PHYSICAL, gpa)",
        "host_physical_memory.write(m, area, ve_area.WORD_PHYSICAL, gla)",
        "table 26-1: the guest-physical address is at offset 24",
        named(LOG, "a_violation_by_guest_paging_is_convertible"),
    ),
    Mutant(
        "ve-eptp-index",
        VE_PY,
        "host_physical_memory.write(m, area, ve_area.WORD_EPTP_INDEX, rest | index)",
        "host_physical_memory.write(m, area, ve_area.WORD_EPTP_INDEX, index)",
        "table 26-1: the EPTP index has 16 bits",
        named(LOG, "the_information_area"),
    ),
)
