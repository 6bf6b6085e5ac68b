"""Words of frame 0: where the machine's trees begin, and what it counts.

A counter is a position here and a name in ``COUNTERS``; the names are those of ``GET /v1/vms/{vm}/counters``.
"""

from engine.arch.words import positions
from engine.cpu.guest_memory import ROOT_MEMORY

# The word between these is the root of guest memory, which the processor reads too: ``cpu.guest_memory``.
# SPPT_TREES is how many SPPTs KVM keeps: 0 before SPP is on; their roots are in the vCPU records. SPPT_EDITED says that
# a client has stored an SPPT entry, after which the trees may differ.
ROOT_EPT, SPPT_TREES, ROOT_POLICY, ROOT_GRANTED = positions(4)
SPP_ACTIVE, EPT_LEVELS, ROOT_REGIONS, ROOT_HOST, NEXT_HOST_FRAME, SPPT_EDITED = positions(6, int(ROOT_MEMORY) + 1)

# Dirty tracking (``kvm.dirty_marking``): the trees of written sub-pages and of KVM's log, what is tracked and how, the
# last harvest and the last one that was acknowledged. ``ROOT_ACCESS`` is the tree of page access
# (``kvm.kvmi_rights``).
ROOT_WRITTEN, ROOT_LOG, ROOT_ACCESS, DIRTY_MODE, HARVESTS, ACKNOWLEDGED = positions(6, 32)

# Which allocation of the host from now fails; 0: none.
(FAIL_ALLOCATION,) = positions(1, 48)

# The frame of the partition assist page that KVM shares with a Hyper-V below it, 0 for none.
(PARTITION_ASSIST,) = positions(1, 49)

# The record at which a replay stopped last, and the two words of it; the second of them is 0 where none did.
STOPPED_AT, STOPPED_GPA, STOPPED_WORD = positions(3, 50)
# How many pages user space lets the MMU keep (KVM_SET_NR_MMU_PAGES), 0 before it says so.
(MMU_PAGES,) = positions(1, 53)
# The root of the EPT for vCPUs in system-management mode; 0 before there is a slot of address space 1.
(ROOT_EPT_SMM,) = positions(1, 54)
# Frames that memory images have brought, which a machine may have beside those that others bound it to.
(IMAGE_FRAMES,) = positions(1, 63)

# Where the symbols of the guest are kept (``state.kept_bytes``), 0 where there are none, and how many bytes they are.
SYMBOLS, SYMBOLS_SIZE = positions(2, 60)

COUNTERS_AT = 64
COUNTERS = (
    "records",
    "writes",
    "violations",
    "page_granular_violations",
    "mmio",
    "unenforced_writes",
    "exits_ept_violation",
    "exits_ept_misconfiguration",
    "exits_spp_miss",
    "exits_spp_misconfiguration",
    "exits_pml_full",
    "faults_mapped",
    "faults_armed",
    "faults_restored",
    "sppt_fills",
    "grants",
    "tlb_flushes",
    "exceptions",
    "stale_accesses",
    "dirty_faults",
    "dirty_harvests",
    "faults_split",
    "emulated_writes",
    "host_writes",
    "untranslated",
)
(
    RECORDS,
    WRITES,
    VIOLATIONS,
    PAGE_GRANULAR,
    MMIO,
    UNENFORCED,
    EPT_VIOLATION,
    EPT_MISCONFIGURATION,
    SPP_MISS,
    SPP_MISCONFIGURATION,
    PML_FULL,
    MAPPED,
    ARMED,
    RESTORED,
    SPPT_FILLS,
    GRANTS,
    TLB_FLUSHES,
    EXCEPTIONS,
    STALE_ACCESSES,
    DIRTY_FAULTS,
    DIRTY_HARVESTS,
    SPLIT,
    EMULATED,
    HOST_WRITES,
    UNTRANSLATED,
) = range(len(COUNTERS))
