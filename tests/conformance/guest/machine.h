/* Instructions, VMCS field encodings and MSR numbers the program uses (Intel SDM vol. 3, appendix B and vol. 4). */
#ifndef MACHINE_H
#define MACHINE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum {
    MSR_FEATURE_CONTROL = 0x3a,
    MSR_VMX_BASIC = 0x480,
    MSR_VMX_PROCBASED_CTLS2 = 0x48b,
    MSR_VMX_EPT_VPID_CAP = 0x48c,
    MSR_VMX_TRUE_PINBASED_CTLS = 0x48d,
    MSR_VMX_TRUE_PROCBASED_CTLS = 0x48e,
    MSR_VMX_TRUE_EXIT_CTLS = 0x48f,
    MSR_VMX_TRUE_ENTRY_CTLS = 0x490,
    MSR_EFER = 0xc0000080,
};

enum {
    /* 16-bit */
    GUEST_ES_SELECTOR = 0x800, /* ES, CS, SS, DS, FS, GS, LDTR, TR: steps of 2 here and in the next three */
    HOST_ES_SELECTOR = 0xc00,  /* ES, CS, SS, DS, FS, GS, TR */
    /* 64-bit */
    EPT_POINTER = 0x201a,
    SPP_TABLE_POINTER = 0x2030,
    GUEST_PHYSICAL_ADDRESS = 0x2400,
    VMCS_LINK_POINTER = 0x2800,
    GUEST_EFER = 0x2806,
    HOST_EFER = 0x2c02,
    /* 32-bit */
    PIN_CONTROLS = 0x4000,
    PRIMARY_CONTROLS = 0x4002,
    EXCEPTION_BITMAP = 0x4004,
    EXIT_CONTROLS = 0x400c,
    ENTRY_CONTROLS = 0x4012,
    SECONDARY_CONTROLS = 0x401e,
    INSTRUCTION_ERROR = 0x4400,
    EXIT_REASON = 0x4402,
    EXIT_INTERRUPTION_INFO = 0x4404,
    EXIT_INTERRUPTION_ERROR = 0x4406,
    GUEST_ES_LIMIT = 0x4800,
    GUEST_GDTR_LIMIT = 0x4810,
    GUEST_IDTR_LIMIT = 0x4812,
    GUEST_ES_RIGHTS = 0x4814,
    GUEST_INTERRUPTIBILITY = 0x4824,
    GUEST_ACTIVITY = 0x4826,
    /* natural width */
    EXIT_QUALIFICATION = 0x6400,
    GUEST_LINEAR_ADDRESS = 0x640a,
    GUEST_CR0 = 0x6800,
    GUEST_CR3 = 0x6802,
    GUEST_CR4 = 0x6804,
    GUEST_DR7 = 0x681a,
    GUEST_RSP = 0x681c,
    GUEST_RIP = 0x681e,
    GUEST_RFLAGS = 0x6820,
    GUEST_PENDING_DEBUG = 0x6822,
    HOST_CR0 = 0x6c00,
    HOST_CR3 = 0x6c02,
    HOST_CR4 = 0x6c04,
};

enum { PRIMARY_SECONDARY = 1u << 31 };
enum { EXIT_HOST_64BIT = 1 << 9, EXIT_SAVE_EFER = 1 << 20, EXIT_LOAD_EFER = 1 << 21 };
enum { ENTRY_64BIT = 1 << 9, ENTRY_LOAD_EFER = 1 << 15 };

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void in_words(u16 port, void *to, u64 words)
{
    __asm__ volatile("rep insw" : "+D"(to), "+c"(words) : "d"(port) : "memory");
}

static inline u64 read_msr(u32 number)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(number));
    return (u64)high << 32 | low;
}

static inline u32 physical_width(void)
{
    u32 eax = 0x80000008, ebx, ecx = 0, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    return eax & 0xff;
}

static inline u64 read_cr0(void) { u64 v; __asm__ volatile("mov %%cr0, %0" : "=r"(v)); return v; }
static inline u64 read_cr3(void) { u64 v; __asm__ volatile("mov %%cr3, %0" : "=r"(v)); return v; }
static inline u64 read_cr4(void) { u64 v; __asm__ volatile("mov %%cr4, %0" : "=r"(v)); return v; }

static inline int vmxon(u64 address)
{
    u8 failed;
    __asm__ volatile("vmxon %1; setna %0" : "=q"(failed) : "m"(address) : "cc", "memory");
    return failed;
}

static inline int vmcs_load(u64 address)
{
    u8 failed;
    __asm__ volatile("vmclear %1; setna %0" : "=q"(failed) : "m"(address) : "cc", "memory");
    if (!failed)
        __asm__ volatile("vmptrld %1; setna %0" : "=q"(failed) : "m"(address) : "cc", "memory");
    return failed;
}

static inline int vmwrite(u64 field, u64 value)
{
    u8 failed;
    __asm__ volatile("vmwrite %1, %2; setna %0" : "=q"(failed) : "r"(value), "r"(field) : "cc");
    return failed;
}

static inline u64 vmread(u64 field)
{
    u64 value = 0;
    __asm__ volatile("vmread %1, %0" : "=r"(value) : "r"(field) : "cc");
    return value;
}

static inline int invept_all(void)
{
    struct { u64 eptp, zero; } descriptor = {0, 0};
    u8 failed;
    __asm__ volatile("invept %1, %2; setna %0" : "=q"(failed) : "m"(descriptor), "r"(2ul) : "cc", "memory");
    return failed;
}

#endif
