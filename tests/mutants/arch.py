"""Wrong numbers in ``engine/arch``."""

from __future__ import annotations

from .mutant import Mutant
from .paths import DERIVED, LOG, full, named, plain

EPT = "engine/arch/ept.py"
SPPT = "engine/arch/sppt.py"
EXITS = "engine/arch/exits.py"

MUTANTS = (
    Mutant(
        "arch-2m-bit-12",
        EPT,
        "RESERVED_2M = 0x001F_F000  # 20:12, bit 12 included: EPT has no PAT bit",
        "RESERVED_2M = 0x001F_E000",
        "table 29-5: bits 20:12 of a 2-MByte page are reserved",
        plain("B17"),
    ),
    Mutant(
        "arch-1g-bit-29",
        EPT,
        "RESERVED_1G = 0x3FFF_F000  # 29:12",
        "RESERVED_1G = 0x1FFF_F000",
        "table 29-3: bits 29:12 of a 1-GByte page are reserved",
        plain("B22"),
    ),
    Mutant(
        "arch-odd-bit-63",
        SPPT,
        "VECTOR_RESERVED = signed(0xAAAA_AAAA_AAAA_AAAA)",
        "VECTOR_RESERVED = signed(0x2AAA_AAAA_AAAA_AAAA)",
        "29.3.4.2: every odd bit of SPPL1E is reserved",
        plain("C12"),
    ),
    Mutant(
        "arch-sppt-bit-11",
        SPPT,
        "RESERVED_LOW = 0xFFE",
        "RESERVED_LOW = 0x7FE",
        "29.3.4.2: bits 11:1 of SPPL4E to SPPL2E are reserved",
        plain("C18"),
    ),
    Mutant(
        "arch-q-linear-writable",
        EXITS,
        "Q_LINEAR_WRITABLE = 1 << 10",
        "Q_LINEAR_WRITABLE = 1 << 11",
        "table 28-7: bit 10, the linear page is writable",
        full("N01"),
    ),
    Mutant(
        "arch-q-asynchronous",
        EXITS,
        "Q_ASYNCHRONOUS = 1 << 16",
        "Q_ASYNCHRONOUS = 1 << 15",
        "table 28-7: bit 16, asynchronous to the instruction",
        named(DERIVED, "k20_nmi_unblocking"),
    ),
    Mutant(
        "arch-q-shadow-stack",
        EXITS,
        "Q_SHADOW_STACK = 1 << 13",
        "Q_SHADOW_STACK = 1 << 12",
        "table 28-7: bit 13, a shadow-stack access",
        named(DERIVED, "k19_supervisor_shadow_stack"),
    ),
    Mutant(
        "arch-q-spp-miss",
        EXITS,
        "Q_SPP_MISS = 1 << 11",
        "Q_SPP_MISS = 1 << 12",
        "28.2.1: bit 11 tells an SPP miss from a misconfiguration",
        plain("C15"),
    ),
    Mutant(
        "arch-ve-busy",
        "engine/arch/ve_area.py",
        "BUSY = signed(0xFFFF_FFFF_0000_0000)",
        "BUSY = 1 << 32",
        "26.5.7.2: FFFFFFFFH is stored at offset 4",
        named(LOG, "the_information_area"),
    ),
)
