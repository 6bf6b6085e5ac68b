"""The printed vectors: id, setup, access, expected outcome, and beside each row why. Both test suites run them."""

Row = tuple[str, str, str, str]

# A. Plain EPT permissions
PERMISSIONS: tuple[Row, ...] = (
    ("A01", "PTE=0x37", "read 8 +0", "OK"),  # RWX, read
    ("A02", "PTE=0x37", "write 8 +0", "OK"),  # RWX, write
    ("A04", "PTE=0x31", "fetch +0", "48 q=0x18C"),  # R--, fetch
    ("A05", "PTE=0x33", "fetch +0", "48 q=0x19C"),  # RW-, fetch
    ("A07", "PTE=0x34", "read 8 +0", "48 q=0x1A1"),  # --X (X-only supported), read
    ("A08", "PTE=0x34", "write 8 +0", "48 q=0x1A2"),  # --X, write
    ("A10", "PTE raw=0", "read 8 +0", "48 q=0x181"),  # PTE not present, read: bits 5:3 = 0
    ("A11", "PTE raw=0", "write 8 +0", "48 q=0x182"),  # PTE not present, write
    ("A13", "PDE=0", "write 8 +0", "48 q=0x182"),  # PDE not present: bits 5:3 = 0 although upper entries are RWX
    ("A14", "PDE=PT|1", "write 8 +0", "48 q=0x18A"),  # PDE R--, PTE RWX: AND over levels
    ("A16", "G39; PML4E=PDPT|5", "write 8 +0", "48 q=0x1AA gpa=0x8000801000"),  # PML4E W=0 alone
    ("A17", "G39; PDPTE=PD|5", "write 8 +0", "48 q=0x1AA gpa=0x8000801000"),  # PDPTE W=0 alone
    ("A19", "PTE=0x35", "ADD m64 +0", "48 q=0x1AA or 0x1AB"),  # non-locked RMW: bit1=1; bit0 implementation-specific
    ("A20", "PTE=0x35", "LOCK ADD m64 +0", "48 q=0x1AA or 0x1AB"),  # locked RMW: same
)

# B. Misconfiguration and reserved bits (MAXPHYADDR = 40)
MISCONFIGURATION: tuple[Row, ...] = (
    ("B01", "PTE=0x32", "read 8 +0", "49"),  # -W-
    ("B02", "PTE=0x36", "read 8 +0", "49"),  # -WX
    ("B04", "PTE=0x1F", "read 8 +0", "49"),  # leaf memory type 3
    ("B05", "PTE=0x3F", "read 8 +0", "49"),  # leaf memory type 7
    ("B07", "PTE=0x0F", "read 8 +0", "OK"),  # leaf memory type 1 (WC) valid
    ("B08", "PTE=0x27", "read 8 +0", "OK"),  # leaf memory type 4 (WT) valid
    ("B10", "PTE=0x37|(1<<40)", "read 8 +0", "49"),  # PTE address bit 40, MAXPHYADDR=40
    ("B11", "PTE=0x37|(1<<51)", "read 8 +0", "49"),  # PTE address bit 51
    ("B13", "PTE=0x37|(1<<60)", "write 8 +0", "OK"),  # bit 60 ignored when EPTP[7]=0
    ("B14", "PDE=PT|7|8", "read 8 +0", "49"),  # non-leaf PDE bit 3
    ("B16", "PDE=0x800000|0xB7", "write 8 +0", "OK"),  # 2M leaf PDE
    ("B17", "PDE=0x801000|0xB7", "read 8 +0", "49"),  # 2M leaf PDE with bit 12 set
    ("B19", "PDE=0x900000|0xB7", "read 8 +0", "49"),  # 2M leaf PDE with bit 20 set
    ("B20", "G39; PDPTE=0xB7", "write 8 +0", "OK"),  # 1G leaf PDPTE
    ("B22", "G39; PDPTE=0x20000000|0xB7", "read 8 +0", "49 gpa=0x8000801000"),  # 1G leaf PDPTE with bit 29 set
    ("B23", "G39; PML4E=PDPT|7|0x80", "read 8 +0", "49 gpa=0x8000801000"),  # PML4E bit 7
    (
        "B25",
        "PTE raw=(1<<51)|0xF80|0x38",
        "read 8 +0",
        "48 q=0x181",
    ),  # bits 2:0=0 -> not present, reserved/memtype bits ignored -> violation not misconfig
    (
        "B26",
        "PDE=PT|5; PTE=0x3F",
        "write 8 +0",
        "49",
    ),  # upper W=0 AND misconfigured leaf, write: misconfig wins (violation only judged after full walk)
    ("B28", "PDE=PT|2", "read 8 +0", "49"),  # PDE -W-: misconfig at non-leaf
    ("B29", "PDE=PT|2; PTE raw=0", "read 8 +0", "49"),  # misconfigured PDE is met before the not-present PTE
    ("B31", "PTE=0x37|(1<<58)", "write 8 +0", "OK"),  # bit 58 ignored, paging-write control 0
)

# C. SPP eligibility and SPPT walk
SUBPAGES: tuple[Row, ...] = (
    ("C01", "PTE=0x35|b61; vec=1", "write 8 +0", "OK"),  # S=0 allowed
    ("C03", "PTE=0x35|b61; vec=1", "write 8 +0x80", "48 q=0x1AA"),  # S=1 denied
    ("C04", "PTE=0x35|b61; vec=4", "write 8 +0x80", "OK"),  # S=1 allowed by vector bit 2
    ("C06", "PTE=0x35|b61; vec=4", "write 1 +0x7F", "48 q=0x1AA"),  # last byte of S=0, denied
    ("C07", "PTE=0x35|b61; vec=4", "write 1 +0x100", "48 q=0x1AA"),  # first byte of S=2, denied
    ("C09", "PTE=0x35|b61; vec=1<<32", "write 4 +0x800", "OK"),  # S=16 is vector bit 32
    ("C10", "PTE=0x31|b61; vec=ALL&~1", "write 8 +0", "48 q=0x18A"),  # R-- leaf, S=0 denied: bits 5:3 = 001
    ("C12", "PTE=0x35|b61; vec=1|(1<<63)", "write 8 +0", "66 q=0x0"),  # odd vector bit 63 set although S=0 allowed
    ("C13", "PTE=0x35|b61; vec=2", "write 8 +0x80", "66 q=0x0"),  # odd bit anywhere, even for another sub-page
    ("C15", "PTE=0x35|b61; L3E=0", "write 8 +0", "66 q=0x800"),  # SPPL3E invalid: miss
    ("C16", "PTE=0x35|b61; L2E=0", "write 8 +0", "66 q=0x800"),  # SPPL2E invalid: miss
    ("C18", "PTE=0x35|b61; L3E=L2|1|0x800; vec=1", "write 8 +0", "66 q=0x0"),  # SPPL3E reserved bit 11
    (
        "C19",
        "PTE=0x35|b61; L2E=L1|1|0x80; vec=1",
        "write 8 +0",
        "66 q=0x0",
    ),  # SPPL2E bit 7 is reserved (no large SPP entries)
    (
        "C21",
        "PTE=0x35|b61; L2E=L1|1|(1<<52); vec=1",
        "write 8 +0",
        "66 q=0x0",
    ),  # SPPL2E bit 52 (63:52 reserved in SPPT, unlike EPT)
    ("C22", "PTE=0x35|b61; L2E=L1|1|(1<<63); vec=1", "write 8 +0", "66 q=0x0"),  # SPPL2E bit 63
    (
        "C24",
        "PTE=0x35|b61; L3E=L2|3; L2E=0",
        "write 8 +0",
        "66 q=0x0",
    ),  # L3E misconfigured, L2E invalid: walk stops at L3E
    ("C25", "PTE=0x35|b61; L3E=0; vec=2", "write 8 +0", "66 q=0x800"),  # miss at L3 hides bad vector
    ("C27", "PTE=0x35; vec=ALL", "write 8 +0", "48 q=0x1AA"),  # control 1, bit 61 = 0: no SPP
    ("C28", "PTE=0x37|b61; vec=0", "write 8 +0", "OK"),  # writable page: SPP never takes permission away
    ("C30", "PTE=0x37|b61; L4E=L3|0xFFF", "write 8 +0", "OK"),  # writable page: no SPP misconfig
    ("C31", "PTE=0x35|b61; L4E=0", "read 8 +0", "OK"),  # reads never consult the SPPT
    ("C33", "PTE=0x31|b61; vec=ALL", "fetch +0", "48 q=0x18C"),  # SPP grants no execute
    ("C34", "PTE=0x34|b61; vec=ALL", "read 8 +0", "48 q=0x1A1"),  # SPP grants no read
    ("C36", "PDE=0x800000|0xB5|b61; vec=ALL", "write 8 +0", "48 q=0x1AA"),  # 2M page: bit 61 ignored, never eligible
    ("C37", "G39; PDPTE=0xB5|b61; vec=ALL", "write 8 +0", "48 q=0x1AA gpa=0x8000801000"),  # 1G page: never eligible
    ("C39", "PDE=PT|5; PTE=0x37|b61; vec=0", "write 8 +0", "48 q=0x1AA"),  # same, denied; bit 4 = AND = 0
    ("C40", "PDE=PT|5; PTE=0x37|b61; L2E=0", "write 8 +0", "66 q=0x800"),  # same, SPP miss
    (
        "C42",
        "G39; PML4E=PDPT|5; PTE|=b61; vec=1",
        "write 8 +0",
        "OK",
    ),  # PML4E W=0, leaf bit 61: eligible; SPPT indexed with GPA[47:39]=1
    (
        "C43",
        "G39; PML4E=PDPT|5; PTE|=b61; L4E[1]=0",
        "write 8 +0",
        "66 q=0x800 gpa=0x8000801000",
    ),  # index check: SPPL4E[1] is used, [0] valid does not help
    ("C45", "PTE=0x3D|b61; vec=ALL", "write 8 +0", "49"),  # EPT misconfig (memtype 7) beats SPP
    (
        "C46",
        "PTE=0x30|b61; L4E=0",
        "write 8 +0",
        "48 q=0x182",
    ),  # not-present leaf with bit 61: plain violation, no SPP event
    ("C48", "PTE=0x35|b61; vec=ALL", "write 8 +0xFF8", "OK"),  # all sub-pages allowed
)

# D. Width, alignment, instruction kind
WIDTHS: tuple[Row, ...] = (
    (
        "D01",
        "PTE=0x35|b61; vec=1",
        "write 8 +0x7C",
        "48 q=0x1AA",
    ),  # 8-byte write over S0(allow)/S1(deny): must be refused
    ("D03", "PTE=0x35|b61; vec=5", "write 8 +0x7C", "OK"),  # S0 and S1 allowed
    ("D04", "PTE=0x35|b61; vec=1", "MOVUPS +0x70", "OK"),  # 16 B inside S0
    ("D06", "PTE=0x35|b61; vec=1", "VMOVDQU64 zmm +0x40", "OK"),  # 64 B aligned store inside S0
    ("D07", "PTE=0x35|b61; vec=1", "VMOVDQU64 zmm +0x60", "48 q=0x1AA"),  # 64 B store over S0(allow)/S1(deny)
    ("D09", "PTE=0x35|b61; vec=1", "XCHG m64 +0", "OK"),  # XCHG allowed
    # XCHG denied: bit 0 implementation-specific
    ("D10", "PTE=0x35|b61; vec=0", "XCHG m64 +0", "48 q=0x1AA or 0x1AB"),
    ("D12", "PTE=0x35|b61; vec=0", "LOCK ADD m64 +0", "48 q=0x1AA or 0x1AB"),  # LOCK ADD denied
    (
        "D13",
        "PTE=0x35|b61; vec=0",
        "LOCK CMPXCHG (mismatch) +0",
        "48 q=0x1AA or 0x1AB",
    ),  # LOCK CMPXCHG that would not match: still a write
    ("D15", "PTE=0x35|b61; vec=0", "PUSH +0", "48 q=0x1AA"),  # PUSH denied
    (
        "D16",
        "PTE=0x35|b61; vec=1",
        "REP STOSB +0 n=64",
        "OK / 48 q=0x1AA",
    ),  # REP STOSB 64 bytes inside S0: multi-write instruction, model-specific
    (
        "D18",
        "PTE=0x35|b61; vec=0x55",
        "FXSAVE64 +0",
        "OK / 48 q=0x1AA",
    ),  # FXSAVE over S0..S3 all allowed: multi-write, model-specific
    (
        "D19",
        "PTE=0x35|b61; vec=0x01",
        "FXSAVE64 +0",
        "48 q=0x1AA",
    ),  # FXSAVE over S0(allow) S1..S3(deny): must not complete
    (
        "D21",
        "PTE=0x35|b61; vec=0",
        "write 8 +0xFFC",
        "48 q=0x1AA",
    ),  # page-crossing write, S31 denied, next page RWX: refused
    (
        "D22",
        "nextPTE=0x35; PTE=0x35|b61; vec=1<<62",
        "write 8 +0xFFC",
        "48 q=0x1AA",
    ),  # page-crossing, S31 allowed, next page R-X without bit 61: refused (GPA model-specific)
    # INT n frame push denied: IDT-vectoring valid
    ("D24", "PTE=0x35|b61; vec=0", "INT 80h frame +0x10", "48 q=0x1AA"),
    (
        "D25",
        "PTE=0x35|b61; L2E=0",
        "INT 80h frame +0x10",
        "66 q=0x800 / 48 q=0x1AA",
    ),  # INT n frame push, SPP miss: IDT-vectoring valid
)

# E. Guest paging structures and #PF priority (guest PTE of the test page is at GPA 0xA00008)
GUEST_PAGING: tuple[Row, ...] = (
    (
        "E01",
        "gPTpage.PTE=0x35; gPTE=0x801000|0x63",
        "read 8 +0",
        "OK",
    ),  # EPT A/D off, guest PT read-only in EPT, A=D=1: nothing to write
    (
        "E02",
        "gPTpage.PTE=0x35; gPTE=0x801000|0x43",
        "read 8 +0",
        "48 q=0xAB gpa=0xA00008",
    ),  # EPT A/D off, guest A=0: A update is a paging write -> violation, both bits 0 and 1
    ("E04", "gPTpage.PTE=0x35; gPTE=0x801000|0x23", "read 8 +0", "OK"),  # EPT A/D off, guest D=0, read: no update
    (
        "E05",
        "EPTP.AD=1; gPTpage.PTE=0x35",
        "read 8 +0",
        "48 q=0xAB gpa=0xA00008",
    ),  # EPT A/D on: walk read counts as write; bits 0 and 1 both set, bit 8 clear
    (
        "E07",
        "gPTpage.PTE=0x35|b61; gPTE=0x801000|0x43; L2E[5]=L1|1; vec(gPT)=ALL",
        "read 8 +0",
        "48 q=0xAB gpa=0xA00008",
    ),  # guest A update, bit 61, all-ones vector: never eligible
    ("E08", "gPTpage.PTE raw=0", "read 8 +0", "48 q=0x81 gpa=0xA00008"),  # guest PT not present in EPT, A/D off
    (
        "E10",
        "gPTpage.PTE raw=0",
        "write 8 +0",
        "48 q=0x81 gpa=0xA00008",
    ),  # same for a write access: the walk access is a read
    (
        "E11",
        "gPTE=0; PTE raw=0",
        "write 8 +0",
        "#PF err=0x2",
    ),  # guest PTE not present: #PF before any EPT check of the data page
    ("E13", "gPTE=0x801000|0x61; PTE=0x35|b61; L4E=0", "write 8 +0", "#PF err=0x3"),  # #PF beats SPP miss
    (
        "E14",
        "gPTE=0x801000|0x61; PTE=0x32",
        "write 8 +0",
        "#PF err=0x3",
    ),  # #PF (permission) beats EPT misconfig of the data page
    (
        "E16",
        "gPTpage.PTE=0x35|b61; L2E[5]=L1|1; vec(gPT)=ALL",
        "write 8 0xA00000",
        "OK",
    ),  # an ordinary MOV to a page that holds a guest page table IS eligible
)

# F. A/D, PML, #VE
FLAGS_AND_VE: tuple[Row, ...] = (
    (
        "F01",
        "EPTP.AD=1; PTE=0x35|b61; vec=1",
        "write 8 +0",
        "OK (leaf A=1 D=1)",
    ),  # SPP-allowed write sets A and D in the leaf
    ("F03", "EPTP.AD=1; PTE=0x35|b61; vec=1", "read 8 +0", "OK (leaf A=1 D=0)"),  # read sets A only
    ("F06", "VE=1; PTE=0x35", "write 8 +0", "#VE q=0x1AA"),  # #VE on, suppress=0: converted
    (
        "F08",
        "VE=1; PTE=0x35|b61; vec=0",
        "write 8 +0",
        "#VE q=0x1AA",
    ),  # SPP-denied write is an EPT violation, so convertible
    ("F09", "VE=1; PTE=0x35|b61|(1<<63); vec=0", "write 8 +0", "48 q=0x1AA"),  # SPP-denied, suppress=1
    ("F11", "VE=1; PTE=0x35|b61; L2E=L1|3", "write 8 +0", "66 q=0x0"),  # SPP misconfig is never converted
    ("F12", "VE=1; PTE=0x35; VEinfo[4]=1", "write 8 +0", "48 q=0x1AA"),  # #VE area busy (offset 4 != 0): VM exit
    ("F14", "VE=1; PTE raw=0", "write 8 +0", "#VE q=0x182"),  # not present, bit 63 = 0: converted
    ("F15", "VE=1; PTE raw=1<<63", "write 8 +0", "48 q=0x182"),  # not present, bit 63 = 1: VM exit
    (
        "F17",
        "AD-ALL; EPTP.AD=1; PML=1; PTE=0x35|0x300|b61; vec=1; PMLidx=FFFF",
        "write 8 +0",
        "OK",
    ),  # PML index out of range but every A/D flag already set: no log-full event
    (
        "F18",
        "AD-ALL; EPTP.AD=1; PML=1; PTE=0x37; PMLidx=FFFF",
        "read 8 +0",
        "62",
    ),  # PML index out of range, only an A flag to set (read): log-full event all the same
    (
        "F20",
        "AD-ALL; EPTP.AD=1; PML=1; PTE=0x35|b61; L2E=0; PMLidx=FFFF",
        "write 8 +0",
        "66 q=0x800",
    ),  # SPP miss with PML full: permission is resolved before the PML check (order UNVERIFIED on hardware)
)

# N. Advanced VM-exit information, exact bits 11:9 (needs EPT_VPID_CAP[22]=1)
ADVANCED: tuple[Row, ...] = (
    ("N01", "gU=1; gPTE=0x801000|0x67; PTE=0x35", "write 8 +0", "48 q=0x7AA"),  # user-mode linear page, RW, X
    ("N03", "gPTE=0x801000|0x63|(1<<63); PTE=0x35", "write 8 +0", "48 q=0xDAA"),  # supervisor, RW, NX
    ("N04", "gU=1; gPTE=0x801000|0x65|(1<<63); PTE raw=0", "read 8 +0", "48 q=0xB81"),  # user, read-only, NX
)

# M. Mode-based execute control (needs PROCBASED_CTLS2 bit 22; also shown with advanced info)
MODE_BASED: tuple[Row, ...] = (
    # MBEC: W=0, XS=1, XU=1: bit 6 set also for data accesses
    ("M01", "MBEC=1; PTE=0x435", "write 8 +0", "48 q=0x5EA"),
    ("M02", "MBEC=1; PTE=0x433", "fetch +0", "48 q=0x5DC"),  # MBEC: fetch from supervisor page, XS=0 XU=1
    ("M04", "MBEC=1; PTE=0x432", "read 8 +0", "49"),  # MBEC: -W- plus XU: misconfig
    ("M05", "MBEC=1; PTE=0x435|b61; vec=1", "write 8 +0", "OK"),  # MBEC + SPP allowed
    (
        "M07",
        "MBEC=1; gU=1; gPTE=0x801000|0x67; PTE=0x037",
        "fetch +0",
        "48 q=0x7BC",
    ),  # MBEC: fetch through a user-mode linear page, XU=0 XS=1 (CPL irrelevant)
    ("M08", "MBEC=1; PTE raw=0", "fetch +0", "48 q=0x584"),  # MBEC: not present: bits 6:3 = 0
)

# H. VM-entry checks
ENTRY: tuple[Row, ...] = (
    ("H02", "SPPTP=(L4|0x10)", "read 8 +0", "VMfail 7"),  # SPPTP bit 4 set
    ("H03", "SPPTP=(L4|(1<<40))", "read 8 +0", "VMfail 7"),  # SPPTP beyond MAXPHYADDR
    ("H05", "EPTP=root|0x18", "read 8 +0", "OK"),  # EPTP memtype 0 (UC)
    ("H06", "EPTP=root|0x19", "read 8 +0", "VMfail 7"),  # EPTP memtype 1
    (
        "H08",
        "EPTP=root|0x26",
        "read 8 +0",
        "VMfail 7 or OK",
    ),  # EPTP page-walk length 5 (valid only if EPT_VPID_CAP[7]=1)
    ("H09", "EPTP|=0x100", "read 8 +0", "VMfail 7"),  # EPTP bit 8
    ("H11", "EPTP|=1<<40", "read 8 +0", "VMfail 7"),  # EPTP address beyond MAXPHYADDR
    ("H12", "PML=1; PMLaddr=(PMLB|8)", "read 8 +0", "VMfail 7"),  # PML address misaligned
)

# G. Cached information
CACHED: tuple[Row, ...] = (
    (
        "G01",
        "PTE=0x35|b61; vec=1; [run W8]; vec=0; no INVEPT",
        "write 8 +0",
        "OK / 48 q=0x1AA",
    ),  # vector bit 1->0, no INVEPT: both legal
    (
        "G03",
        "PTE=0x35|b61; vec=0; [run R8]; vec=1; no INVEPT",
        "write 8 +0",
        "OK / 48 q=0x1AA",
    ),  # vector 0->1, no INVEPT: spurious violation legal once
    (
        "G04",
        "PTE=0x37; [run W8]; PTE=0x35; no INVEPT",
        "write 8 +0",
        "OK / 48 q=0x1AA",
    ),  # EPT W 1->0, no INVEPT: both legal
    ("G06", "PTE=0x35|b61; vec=1; [run W8]; vec=0", "write 8 +0", "48 q=0x1AA"),  # vector 1->0, with INVEPT
    ("G07", "PTE raw=0; [run R8]; PTE=0x37; no INVEPT", "write 8 +0", "OK"),  # not-present -> present needs no INVEPT
    (
        "G09",
        "PTE=0x35; [run W8]; PTE=0x37; no INVEPT",
        "write 8 +0",
        "OK",
    ),  # after an EPT violation on the page, W 0->1 is seen at once (violation invalidated the mapping)
    (
        "G10",
        "PTE=0x35|b61; L2E=0; [run W8]; L2E=L1|1; vec=1; no INVEPT",
        "write 8 +0",
        "OK",
    ),  # SPP miss repaired without INVEPT (SDM text silent on caching of invalid SPP entries; see 6)
    (
        "G12",
        "PTE=0x35|b61; vec=1",
        "write8; clear vec; write8",
        "OK / 48 q=0x1AA",
    ),  # guest itself clears the vector between two S0 writes, no INVEPT
    (
        "G13",
        "PTE=0x37",
        "write8; clear PTE.W; write8",
        "OK / 48 q=0x1AA",
    ),  # guest itself clears EPT W of the page between two writes, no INVEPT
    (
        "G15",
        "PTE=0x35|b61; vec=1",
        "read8 +0, then write8 +0x80",
        "48 q=0x1AA gpa=0x801080",
    ),  # read of the page (cached) then denied write to S1
)

# K. Derived from the manual: id, what the processor is, setup, access, expected. MOV to CR3 (K14) has tests of its own.
DERIVED: tuple[tuple[str, str, str, str, str], ...] = (
    ("K01", "52 bits", "gPTE=(1<<48)|0x63", "read 8 +0", "48 q=0x181 gpa=0x1000000000000"),  # wider than four levels
    ("K02", "52 bits", "gPTE=(1<<48)|0x63", "write 8 +0", "48 q=0x182 gpa=0x1000000000000"),  # no SPP either
    ("K04", "5-level", "PML5E=PML4|0x87", "read 8 +0", "49"),  # bits 7:3 are reserved in a PML5E
    ("K05", "5-level", "PML5E=PML4|5; PTE=0x37|b61; vec=1", "write 8 +0", "OK"),  # any of the entries used
    ("K07", "no execute-only", "MBEC=1; PTE=0x430", "read 8 +0", "49"),  # only user execute
    ("K08", "no 1-GByte", "G39; PDPTE=0xB7", "read 8 +0", "49"),  # page size unsupported: a reserved bit
    ("K10", "", "paging-write=1; PTE=0x34|(1<<58)", "fetch +0", "49"),  # bit 58 without read
    ("K11", "", "paging-write=1; EPTP.AD=1; gPTpage.PTE=0x31|(1<<58)", "read 8 +0", "OK"),  # paging writes pass
    (
        "K13",
        "",
        "paging-write=1; EPTP.AD=1; gPTpage.PTE=0x35|(1<<58); gPTpage.PDE=gPT|5",
        "read 8 +0",
        "48 q=0xAB gpa=0xA00008",
    ),  # write is still needed above the leaf
    ("K16", "", "CR3=0x40000000", "read 8 +0", "48 q=0x81 gpa=0x40000000"),  # translated only when used
    ("K17", "advanced", "CR0=0x33; PTE raw=0", "write 8 +0", "48 q=0x782"),  # paging off
    (
        "K19",
        "shadow stack",
        "EPTP.SSS=1; PTE=0x31|(1<<60); gPTE=0x801000|0x61",
        "shadow-stack write 8 +0",
        "OK",
    ),  # the leaf's W is irrelevant
    ("K20", "", "PTE=0x35|b61; L2E=0", "IRET write 8 +0", "66 q=0x1800"),  # NMI unblocking
    ("K22", "", "PTE=0x35|b61; vec=ALL", "RTM write 8 +0", "48 q=0x1AA"),  # not in a transaction
    ("K23", "", "PTE=0x35|b61; vec=ALL", "write 8 +0", "OK"),  # the APIC-access page is not modelled
)

ONES = (1 << 64) - 1

# J. INVEPT and INVVPID in root mode: id, type, the words of the descriptor, VM-instruction error or 0.
INVEPT: tuple[tuple[str, int, tuple[int], int], ...] = (
    ("J02", 2, (0,), 0),
    ("J03", 2, (ONES,), 0),
    ("J05", 3, (0x1E,), 28),
    ("INVEPT type 0", 0, (0x1E,), 28),
    ("INVEPT type 1", 1, (0x1E,), 0),
    ("INVEPT type -1", ONES, (0x1E,), 28),
    ("INVEPT type 2^32 + 1", 1 << 32 | 1, (0x1E,), 28),
    ("J06", 1, (0x19,), 28),
    ("J08", 1, (0x1E | 1 << 45,), 28),
    ("J09", 1, (0x16,), 28),
)
INVVPID: tuple[tuple[str, int, tuple[int, int], int], ...] = (
    ("J11", 0, (0, 0), 28),
    ("J12", 0, (1, 1 << 63), 28),
    ("INVVPID type 0", 0, (1, 0xFFFF_8000_0000_0000), 0),
    ("INVVPID type 0, bit 47 alone", 0, (1, 1 << 47), 28),
    ("INVVPID type 1, non-canonical", 1, (1, 1 << 63), 0),
    ("J14", 1, (1 << 16 | 1, 0), 28),
    ("INVVPID descriptor bit 63", 1, (1 << 63 | 1, 0), 28),
    ("INVVPID type 2, bit 16", 2, (1 << 16, 0), 28),
    ("J15", 2, (0, 0), 0),
    ("INVVPID type 1, VPID 0", 1, (0, 0), 28),
    ("J17", 3, (0, 0), 28),
    ("INVVPID type 3", 3, (7, 0), 0),
    ("J18", 4, (1, 0), 28),
)

# Rows whose outcome the manual leaves open, and which of the legal ones is ours (docs/adr/0005).
CHOICES: dict[str, str] = {
    "A19": "48 q=0x1AA",  # a read-modify-write reports the write only
    "A20": "48 q=0x1AA",
    "D10": "48 q=0x1AA",
    "D12": "48 q=0x1AA",
    "D13": "48 q=0x1AA",
    "D16": "OK",  # sub-page permissions apply to instructions that write several times
    "D18": "OK",
    "D22": "48 q=0x1AA gpa=0x802000",  # each page on its own, low page first
    "D25": "66 q=0x800",  # and to the delivery of events
    "F20": "66 q=0x800",  # permission comes before the page log
    "G10": "OK",  # nothing is remembered of an invalid SPPT entry
    "H08": "OK (entry)",  # the default host has EPT of five levels
}


def chosen(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows, with our outcome where several are legal."""
    return tuple((name, setup, access, CHOICES.get(name, expected)) for name, setup, access, expected in rows)
