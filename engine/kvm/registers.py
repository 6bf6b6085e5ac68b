"""Words of frame 0: where the machine's trees begin, and what it counts.

A counter is a position here and a name in ``COUNTERS``; the names are those of ``GET /v1/vms/{vm}/counters``.
"""

from engine.arch.words import positions
from engine.cpu.guest_memory import ROOT_MEMORY

# PARTITION_ASSIST is the frame of the partition assist page that KVM shares with Hyper-V below it, 0 for none.
# The word between these is the root of guest memory, which the processor reads too: ``cpu.guest_memory``.
ROOT_EPT, ROOT_SPPT, ROOT_POLICY, ROOT_GRANTED = positions(4)
SPP_ACTIVE, EPT_LEVELS, PARTITION_ASSIST = positions(3, int(ROOT_MEMORY) + 1)

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
) = range(len(COUNTERS))
