"""VM-execution controls and VMCS fields that decide about guest-physical accesses (SDM vol. 3C, 25.6, appendix B)."""

from engine.arch.words import positions

# Primary processor-based
PRIMARY_TERTIARY = 1 << 17
PRIMARY_SECONDARY = 1 << 31

# Secondary processor-based
SECONDARY_EPT = 1 << 1
SECONDARY_VPID = 1 << 5
SECONDARY_UNRESTRICTED = 1 << 7
SECONDARY_PML = 1 << 17
SECONDARY_VE = 1 << 18
SECONDARY_MBEC = 1 << 22
SECONDARY_SPP = 1 << 23
SECONDARY_TRACE_GUEST_PHYSICAL = 1 << 24

# Tertiary processor-based
TERTIARY_HLAT = 1 << 1
TERTIARY_PAGING_WRITE = 1 << 2
TERTIARY_PAGING_VERIFICATION = 1 << 3

VPID_MASK = 0xFFFF

# Guest interruptibility state (25.4.2)
BLOCKING_BY_NMI = 1 << 3

# VMCS encodings
ENCODING_EPTP = 0x201A
ENCODING_SPPTP = 0x2030
ENCODING_PML_ADDRESS = 0x200E
ENCODING_VE_ADDRESS = 0x202A

# Words of a vCPU record (one 512-word frame each). V_SPPT_ROOT is KVM's own: the frame of the SPPT that it keeps for
# this vCPU, 0 before SPP is on.
(
    V_EPTP,
    V_SPPTP,
    V_PRIMARY,
    V_SECONDARY,
    V_TERTIARY,
    V_PML_ADDRESS,
    V_PML_INDEX,
    V_VE_ADDRESS,
    V_EPTP_INDEX,
    V_VPID,
    V_CR0,
    V_CR3,
    V_CR4,
    V_EFER,
    V_CPL,
    V_RFLAGS,
    V_PDPTE0,
    V_PDPTE1,
    V_PDPTE2,
    V_PDPTE3,
    V_NESTED,
    V_INTERRUPTIBILITY,
    V_SPPT_ROOT,
    V_GUEST_MODE,
    V_NESTED_VM,
    V_NESTED_ROOT,
    V_HV_FLAGS,
    V_HV_FLUSHES,
    V_HV_HYPERCALLS,
    V_HV_EVMCS,
    V_HV_ASSIST,
    V_SPACE,
) = positions(32)

# V_NESTED says which nested guest runs, as the lower hypervisor knows it: 0 none, else bit 0 and its VP id in 63:32;
# V_NESTED_VM is its VM id, V_NESTED_ROOT bits 51:12 of the second-level root that its hypervisor gave it.
# V_HV_* are KVM's notes about Hyper-V: flags of ``hyperv.notes``, two statistics, and the frames of the enlightened
# VMCS and of the VP assist page that KVM itself uses on Hyper-V.
# V_SPACE is the address space in which the vCPU finds its memory, as ``cpu.memory_slots`` has it.
NESTED_RUNS = 1
NESTED_VP_SHIFT = 32
NESTED_VP_MASK = 0xFFFF_FFFF

# What was stored of the local APIC (128 words) and in the format of XSAVE (104 words), and a word that says which of
# them was; ``machine.record_areas`` reads and writes them.
V_AREAS, V_LAPIC = positions(2, 127)
(V_XSAVE,) = positions(1, 256)

# The last words of the record: the frames that hold the vCPU's nested pages, 0 for a page of zeros.
V_VMCS12, V_SHADOW_VMCS12, V_VMCB12 = positions(3, 509)
