"""Sub-page permission table (SDM vol. 3C, 29.3.4.2): always four levels, indexed by GPA[47:12].

entry             bit 0   11:1       N-1:12         63:N
SPPL4E..SPPL2E    valid   reserved   next table     reserved (63:52 too, unlike EPT)
SPPL1E            bit 2s = sub-page s may be written; odd bits reserved. There is no valid bit.
"""

from engine.arch.words import signed

VALID = 1
RESERVED_LOW = 0xFFE
VECTOR_RESERVED = signed(0xAAAA_AAAA_AAAA_AAAA)
VECTOR_ALL = 0x5555_5555_5555_5555

SUBPAGE_SHIFT = 7
SUBPAGE_SIZE = 128
SUBPAGES = 32
FULL_ACCESS = 0xFFFF_FFFF

LEVEL_NAMES = ("", "SPPL1E", "SPPL2E", "SPPL3E", "SPPL4E")
REGION_PAGES = 512  # pages that one SPPL1 table covers: 2 MiB
