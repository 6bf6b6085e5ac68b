"""EPT entries and the EPT pointer (SDM vol. 3C, 29.3.2, tables 29-1 to 29-7; 25.6.11).

bit     PML5E PML4E   non-leaf   1G/2M leaf          4K PTE
0       read          read       read                read
1       write         write      write               write
2       execute       execute    execute             execute        (supervisor-mode execute under MBEC)
5:3     reserved      reserved   memory type         memory type
6       reserved      reserved   ignore PAT          ignore PAT
7       reserved      0          1                   ignored
8       accessed      accessed   accessed            accessed       (EPTP[6])
9       ignored       ignored    dirty               dirty          (EPTP[6])
10      user execute  user ex.   user execute        user execute   (MBEC)
N-1:12  table         table      frame               frame
51:N    reserved      reserved   reserved            reserved
57                               verify paging       verify paging
58                               paging write        paging write
60                               supervisor shadow stack
61      ignored       ignored    ignored             sub-page write permissions
63                               suppress #VE (also in a not-present entry of any level)
"""

from engine.arch.words import signed

READ = 1 << 0
WRITE = 1 << 1
EXECUTE = 1 << 2
MEMORY_TYPE_SHIFT = 3
MEMORY_TYPE_MASK = 7 << 3
IGNORE_PAT = 1 << 6
PAGE = 1 << 7
ACCESSED = 1 << 8
DIRTY = 1 << 9
USER_EXECUTE = 1 << 10
VERIFY_PAGING = 1 << 57
PAGING_WRITE = 1 << 58
SUPERVISOR_SHADOW_STACK = 1 << 60
SPP = 1 << 61
SUPPRESS_VE = signed(1 << 63)

ADDRESS = 0x000F_FFFF_FFFF_F000
RIGHTS = READ | WRITE | EXECUTE
RESERVED_PML = 0xF8  # 7:3 of PML5E and PML4E
RESERVED_TABLE = 0x78  # 6:3 of a PDPTE or PDE that names a table
RESERVED_1G = 0x3FFF_F000  # 29:12
RESERVED_2M = 0x001F_F000  # 20:12, bit 12 included: EPT has no PAT bit

MEMORY_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
UNCACHEABLE = 0
WRITE_BACK = 6

# Level n entries are indexed by nine GPA bits from LEVEL_SHIFT[n]; level 1 is the PTE.
LEVEL_SHIFT = (0, 12, 21, 30, 39, 48)
LEVEL_NAMES = ("", "PTE", "PDE", "PDPTE", "PML4E", "PML5E")
PAGE_SIZE_NAMES = {1: "4K", 2: "2M", 3: "1G"}


def reserved_address(maxphyaddr: int) -> int:
    """Address bits 51:N of an entry, which a processor with ``maxphyaddr`` physical-address bits reserves."""
    return ADDRESS & -1 << maxphyaddr


# EPT pointer
EPTP_MEMORY_TYPE = 7
EPTP_WALK_SHIFT = 3
EPTP_WALK_MASK = 7 << 3
EPTP_ACCESSED_DIRTY = 1 << 6
EPTP_SHADOW_STACK = 1 << 7
EPTP_RESERVED = 0xF00

# IA32_VMX_EPT_VPID_CAP (48CH)
CAP_EXECUTE_ONLY = 1 << 0
CAP_WALK_4 = 1 << 6
CAP_WALK_5 = 1 << 7
CAP_UC = 1 << 8
CAP_WB = 1 << 14
CAP_2M = 1 << 16
CAP_1G = 1 << 17
CAP_INVEPT = 1 << 20
CAP_ACCESSED_DIRTY = 1 << 21
CAP_ADVANCED_EXIT = 1 << 22
CAP_SHADOW_STACK = 1 << 23
CAP_INVEPT_SINGLE = 1 << 25
CAP_INVEPT_ALL = 1 << 26
CAP_INVVPID = 1 << 32
CAP_INVVPID_ADDRESS = 1 << 40
CAP_INVVPID_SINGLE = 1 << 41
CAP_INVVPID_ALL = 1 << 42
CAP_INVVPID_RETAIN_GLOBALS = 1 << 43
