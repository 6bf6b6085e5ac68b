/*
 * The conformance program: a minimal hypervisor that runs one guest access per vector and prints what became of it.
 *
 * It reads an image (vectors.py: header, base words, vectors) from the disk it booted from, stores the base words, and
 * for each vector stores the vector's words, sets EPTP, SPPTP and controls, invalidates, and lets the guest make one
 * access. Afterwards it prints a line to port E9 and restores the words, so that every vector starts from the same
 * memory. It knows no table layout: what the words mean is up to the image.
 *
 * Lines, all numbers hexadecimal:
 *   <n> k <landed> <changes>                               the guest got past the access
 *   <n> x <landed> <changes> <reason> <qual> <gpa> <gla>   VM exit
 *   <n> e <landed> <changes> <vector> <error> <qual>       exception in the guest (qual is the address of a #PF)
 *   <n> f <error>                                          VM entry failed
 * <changes> is "-" or "index:value,..." for words of the vector that the processor changed.
 */
#include "machine.h"

enum { SECTOR = 512, PAGE = 4096, KINDS_SIZES = 7, FETCH = 6, NEAR = 64 };
enum { EXCEPTION = 0, VMCALL = 18 };

static const u64 MAGIC = 0x5254435650505553;

struct header { u64 magic, bytes, base_words, vectors, cr3, code, stack, unused; };
struct word { u64 address, value; };
struct vector {
    u32 number;
    u8 kind, size;
    u16 words;
    u64 linear, eptp, spptp;
    u32 secondary, first_data, second_data, unused;
    struct word word[];
};

/* The image is loaded between table memory and the frames of the test pages. */
static u8 *const image = (u8 *)0x800000;
static const volatile u16 *const program_sectors = (const u16 *)0x7df0; /* boot.asm */
enum { IMAGE_LIMIT = 0x1800000 };

u8 stack[0x4000] __attribute__((aligned(16)));
extern u8 stack_top[];
__asm__(".globl stack_top\n.set stack_top, stack + 0x4000");

static u8 vmxon_region[PAGE] __attribute__((aligned(4096)));
static u8 vmcs_region[PAGE] __attribute__((aligned(4096)));
static u64 saved[64];

extern const u8 stubs_start[], stubs_end[];
extern const u16 stub_offsets[];
int vm_enter(u64 linear, u64 value, int launched);

static void put(char c) { out8(0xe9, (u8)c); }

static void text(const char *s)
{
    while (*s)
        put(*s++);
}

static void hex(u64 value)
{
    int shift = 60;

    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

static void field(u64 value)
{
    put(' ');
    hex(value);
}

__attribute__((noreturn)) static void stop(const char *why)
{
    text(why);
    put('\n');
    for (const char *s = "Shutdown"; *s; s++)
        out8(0x8900, (u8)*s); /* Bochs' power-off port */
    for (;;)
        __asm__ volatile("hlt");
}

static void copy(u8 *to, const u8 *from, u64 n)
{
    while (n--)
        *to++ = *from++;
}

/* ---- disk ------------------------------------------------------------------------------------------------------ */

static void read_sectors(u32 lba, u32 count, u8 *to)
{
    enum { DATA = 0x1f0, COUNT = 0x1f2, LOW = 0x1f3, MIDDLE = 0x1f4, HIGH = 0x1f5, DRIVE = 0x1f6, COMMAND = 0x1f7 };
    enum { READ = 0x20, BUSY = 0x80, REQUEST = 8, FAULTS = 0x21 };

    while (count) {
        u32 n = count < 255 ? count : 255;

        out8(DRIVE, (u8)(0xe0 | (lba >> 24 & 15)));
        out8(COUNT, (u8)n);
        out8(LOW, (u8)lba);
        out8(MIDDLE, (u8)(lba >> 8));
        out8(HIGH, (u8)(lba >> 16));
        out8(COMMAND, READ);
        lba += n;
        count -= n;
        for (; n; n--, to += SECTOR) {
            u8 status;

            do
                status = in8(COMMAND);
            while (status & BUSY || !(status & (REQUEST | FAULTS)));
            if (status & FAULTS)
                stop("E disk");
            in_words(DATA, to, SECTOR / 2);
        }
    }
}

/* ---- VMX ------------------------------------------------------------------------------------------------------- */

static u64 allowed(u32 msr, u64 wanted)
{
    u64 limits = read_msr(msr);

    return (wanted | (u32)limits) & limits >> 32;
}

static void set(u64 number, u64 value)
{
    if (vmwrite(number, value)) {
        text("E vmwrite");
        field(number);
        stop("");
    }
}

static void segment(u32 n, u64 selector, u64 limit, u64 rights)
{
    set(GUEST_ES_SELECTOR + 2 * n, selector);
    set(GUEST_ES_LIMIT + 2 * n, limit);
    set(GUEST_ES_RIGHTS + 2 * n, rights);
}

static void prepare(const struct header *h)
{
    enum { ES, CS, SS, DS, FS, GS, LDTR, TR };
    struct { u16 limit; u64 base; } __attribute__((packed)) gdtr;
    u64 efer = read_msr(MSR_EFER);
    u32 revision = (u32)read_msr(MSR_VMX_BASIC) & 0x7fffffff;

    if ((read_msr(MSR_FEATURE_CONTROL) & 5) != 5)
        stop("E vmx-disabled");
    *(u32 *)vmxon_region = revision;
    *(u32 *)vmcs_region = revision;
    if (vmxon((u64)vmxon_region) || vmcs_load((u64)vmcs_region))
        stop("E vmxon");

    set(PIN_CONTROLS, allowed(MSR_VMX_TRUE_PINBASED_CTLS, 0));
    set(PRIMARY_CONTROLS, allowed(MSR_VMX_TRUE_PROCBASED_CTLS, PRIMARY_SECONDARY));
    set(EXIT_CONTROLS, allowed(MSR_VMX_TRUE_EXIT_CTLS, EXIT_HOST_64BIT | EXIT_SAVE_EFER | EXIT_LOAD_EFER));
    set(ENTRY_CONTROLS, allowed(MSR_VMX_TRUE_ENTRY_CTLS, ENTRY_64BIT | ENTRY_LOAD_EFER));
    set(EXCEPTION_BITMAP, 0xffffffff);
    set(VMCS_LINK_POINTER, ~0ul);

    __asm__ volatile("sgdt %0" : "=m"(gdtr));
    for (u32 n = 0; n < 7; n++)
        set(HOST_ES_SELECTOR + 2 * n, n == 1 ? 8 : n == 6 ? 24 : 16);
    set(0x6c0c, gdtr.base); /* host GDTR; the IDTR base stays 0: nothing here may fault */
    set(HOST_CR0, read_cr0());
    set(HOST_CR3, read_cr3());
    set(HOST_CR4, read_cr4());
    set(HOST_EFER, efer);

    segment(CS, 8, 0xffffffff, 0xa09b);
    for (u32 n = 0; n <= GS; n++)
        if (n != CS)
            segment(n, 16, 0xffffffff, 0xc093);
    segment(LDTR, 0, 0, 0x10000);
    segment(TR, 24, 0x67, 0x8b);
    set(GUEST_GDTR_LIMIT, 0);
    set(GUEST_IDTR_LIMIT, 0);
    set(GUEST_CR0, read_cr0());
    set(GUEST_CR3, h->cr3);
    set(GUEST_CR4, read_cr4());
    set(GUEST_EFER, efer);
    set(GUEST_DR7, 0x400);
}

/* ---- one vector ------------------------------------------------------------------------------------------------ */

/* Byte at a linear distance from the first byte of the first test page, or 0 where its frame is not known. */
static u8 *byte_at(const struct vector *v, int distance)
{
    u64 frame = distance < PAGE ? v->first_data : v->second_data;

    return frame && distance >= 0 ? (u8 *)(frame + (u64)(distance & (PAGE - 1))) : 0;
}

/* Code to be fetched: prefixes that mean nothing, then RET as the last byte of the access. */
static void plant(const struct vector *v, int offset, int code)
{
    for (int i = 0; i < v->size; i++) {
        u8 *at = byte_at(v, offset + i);

        if (at)
            *at = (u8)(!code ? 0 : i == v->size - 1 ? 0xc3 : 0x2e);
    }
}

/* Count the bytes that changed near the access, and clear them. */
static u32 landed(const struct vector *v, int offset)
{
    u32 count = 0;

    for (int i = offset - NEAR; i < offset + v->size + NEAR && i < 2 * PAGE; i++) {
        u8 *at = byte_at(v, i);

        if (at && *at) {
            *at = 0;
            count++;
        }
    }
    return count;
}

/* Print the words that changed, and put back what was there before the vector. */
static void restore(const struct vector *v)
{
    int any = 0;

    for (u32 i = 0; i < v->words; i++) {
        u64 now = *(volatile u64 *)v->word[i].address;

        if (now != v->word[i].value) {
            put(any ? ',' : ' ');
            hex(i);
            put(':');
            hex(now);
            any = 1;
        }
        *(volatile u64 *)v->word[i].address = saved[i];
    }
    if (!any)
        text(" -");
}

static u64 stub_for(const struct header *h, const struct vector *v)
{
    u32 log = 0;

    while (1u << log < v->size)
        log++;
    return h->code + stub_offsets[v->kind * KINDS_SIZES + log];
}

static void run(const struct header *h, const struct vector *v)
{
    static int launched;
    int offset = (int)(v->linear & (PAGE - 1));
    int result;

    if (v->words > sizeof saved / sizeof *saved)
        stop("E words");
    for (u32 i = 0; i < v->words; i++) {
        saved[i] = *(volatile u64 *)v->word[i].address;
        *(volatile u64 *)v->word[i].address = v->word[i].value;
    }
    plant(v, offset, v->kind == FETCH);
    set(EPT_POINTER, v->eptp);
    set(SPP_TABLE_POINTER, v->spptp);
    set(SECONDARY_CONTROLS, allowed(MSR_VMX_PROCBASED_CTLS2, v->secondary));
    set(GUEST_RIP, stub_for(h, v));
    set(GUEST_RSP, h->stack);
    set(GUEST_RFLAGS, 2);
    set(GUEST_INTERRUPTIBILITY, 0);
    set(GUEST_ACTIVITY, 0);
    set(GUEST_PENDING_DEBUG, 0);
    if (invept_all())
        stop("E invept");
    result = vm_enter(v->linear, ~0ul, launched);

    hex(v->number);
    if (result) {
        text(" f");
        field(result == 1 ? vmread(INSTRUCTION_ERROR) : 0);
        plant(v, offset, 0);
        for (u32 i = 0; i < v->words; i++)
            *(volatile u64 *)v->word[i].address = saved[i];
    } else {
        u64 reason = vmread(EXIT_REASON);

        launched = 1;
        if (v->kind == FETCH)
            plant(v, offset, 0);
        text(reason == VMCALL ? " k" : reason == EXCEPTION ? " e" : " x");
        field(landed(v, offset));
        restore(v);
        if (reason == EXCEPTION) {
            field(vmread(EXIT_INTERRUPTION_INFO) & 0xff);
            field(vmread(EXIT_INTERRUPTION_ERROR));
            field(vmread(EXIT_QUALIFICATION));
        } else if (reason != VMCALL) {
            field(reason);
            field(vmread(EXIT_QUALIFICATION));
            field(vmread(GUEST_PHYSICAL_ADDRESS));
            field(vmread(GUEST_LINEAR_ADDRESS));
        }
    }
    put('\n');
}

void main(void)
{
    struct header h = {0};
    const u8 *at;

    text("\nSUBPAGE-CONFORMANCE-BEGIN\nM");
    field(physical_width());
    field(read_msr(MSR_VMX_BASIC));
    field(read_msr(MSR_VMX_EPT_VPID_CAP));
    field(read_msr(MSR_VMX_PROCBASED_CTLS2));
    put('\n');
    read_sectors(1u + *program_sectors, 1, image);
    copy((u8 *)&h, image, sizeof h);
    if (h.magic != MAGIC || h.bytes > IMAGE_LIMIT)
        stop("E image");
    read_sectors(2u + *program_sectors, (u32)((h.bytes + SECTOR - 1) / SECTOR), image);

    for (at = image; h.base_words; h.base_words--, at += sizeof(struct word))
        *(volatile u64 *)((const struct word *)at)->address = ((const struct word *)at)->value;
    copy((u8 *)h.code, stubs_start, (u64)(stubs_end - stubs_start));
    prepare(&h);
    for (u64 n = 0; n < h.vectors; n++) {
        const struct vector *v = (const struct vector *)at;

        run(&h, v);
        at += sizeof *v + v->words * sizeof(struct word);
    }
    stop("SUBPAGE-CONFORMANCE-END");
}
