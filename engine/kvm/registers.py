"""Words of frame 0: where the machine's trees begin, and what it counts.

A counter is a position here and a name in ``COUNTERS``; the names are those of ``GET /v1/vms/{vm}/counters``.
"""

from engine.arch.words import positions

ROOT_EPT, ROOT_SPPT, ROOT_POLICY, ROOT_GRANTED, ROOT_MEMORY, SPP_ACTIVE, EPT_LEVELS = positions(7)

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
) = range(len(COUNTERS))
