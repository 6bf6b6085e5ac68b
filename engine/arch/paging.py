"""The guest's own paging structures and the registers that rule over them (SDM vol. 3A, 4.1 to 4.6).

bit     entry that names a table   entry that maps a page
0       present                    present
1       read/write                 read/write
2       user/supervisor            user/supervisor
5       accessed                   accessed
6       ignored                    dirty
7       0                          1 (a PTE has PAT here)
8       ignored                    global (CR4.PGE)
12      address                    PAT of a large page
N-1:12  table                      page frame
51:N    reserved                   reserved (PAE: 62:N)
63      execute-disable            execute-disable (EFER.NXE, else reserved)
"""

from engine.arch.words import signed

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7
GLOBAL = 1 << 8
EXECUTE_DISABLE = signed(1 << 63)

ADDRESS = 0x000F_FFFF_FFFF_F000
RESERVED_1G = 0x3FFF_E000  # 29:13
RESERVED_2M = 0x001F_E000  # 20:13
RESERVED_ABOVE_52 = 0x7FF0_0000_0000_0000  # 62:52, of PAE entries
RESERVED_PDPTE = 0x1E6  # 8:5 and 2:1, of PAE page-directory-pointer entries

# 32-bit paging: a 4-MByte page has address bits 39:32 in 20:13, and bit 21 reserved.
ADDRESS_32 = 0xFFFF_F000
LARGE_32_LOW = 0xFFC0_0000
LARGE_32_HIGH_SHIFT = 13
LARGE_32_RESERVED = 1 << 21

CR0_PE = 1 << 0
CR0_WP = 1 << 16
CR0_PG = 1 << 31
CR3_PCID = 0xFFF
CR3_KEEP = signed(1 << 63)  # of the operand of MOV to CR3, with CR4.PCIDE: flush nothing
CR3_PAE_TABLE = 0xFFFF_FFE0
CR3_RESERVED_HIGH = signed(0xFFF0_0000_0000_0000)  # 63:52; below them, bits beyond MAXPHYADDR
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
CR4_LA57 = 1 << 12
CR4_PCIDE = 1 << 17
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
RFLAGS_AC = 1 << 18

LINEAR_48, LINEAR_57 = 48, 57


def canonical(linear: int, bits: int = LINEAR_48) -> bool:
    """Whether a linear address, a 64-bit word read with its sign or without, repeats the highest of its ``bits``."""
    return linear >> (bits - 1) in (0, -1, (1 << (65 - bits)) - 1)
