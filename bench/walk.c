/* The baseline in C: what a hypervisor author would write by hand.
 *
 * An EPT and an SPPT in hardware format (4 levels, 4 KiB pages), walked behind a direct-mapped software TLB of 4096 entries, over
 * records of 16 bytes: u64 GPA, u16 size, u8 access, u8 zero, u16 vCPU, u16 zero. The EPT starts empty; a page is mapped when it is
 * first touched, and gets the SPP bit and no W bit if the SPPT has a vector for it. Addresses outside RAM are counted as MMIO.
 *
 * Build: cc -O3 -march=native -shared -fPIC
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

#define PAGE_SHIFT 12
#define SUBPAGE_SHIFT 7
#define ENTRIES 512
#define ADDRESS_MASK 0x000ffffffffff000ull /* bits 51:12 of any entry */

#define EPT_R (1ull << 0)
#define EPT_W (1ull << 1)
#define EPT_X (1ull << 2)
#define EPT_RWX (EPT_R | EPT_W | EPT_X)
#define EPT_WB (6ull << 3)
#define EPT_SPP (1ull << 61)
#define SPPT_VALID (1ull << 0)
#define SPPT_WRITE_BITS 0x5555555555555555ull /* even bits: sub-page i is bit 2i */

#define TLB_ENTRIES 4096
#define NO_TAG (~0ull)
#define ALL_WRITABLE 0xffffffffu

enum { READ, WRITE, EXECUTE };

struct record {
    uint64_t gpa;
    uint16_t size;
    uint8_t access, zero;
    uint16_t vcpu, zero2;
};

struct tlb_entry {
    uint64_t tag; /* GFN */
    uint32_t writable;
};

struct machine {
    struct tlb_entry tlb[TLB_ENTRIES];
    uint64_t (*frames)[ENTRIES];
    size_t used, capacity;
    size_t kept; /* frames of the SPPT, which outlive a reset */
    uint64_t ram_pages;
    uint64_t ept_root, sppt_root; /* physical addresses: frame number << 12 */
};

struct totals {
    uint64_t violations, page_granular, mmio, mapped, walks;
};

static uint64_t *table(struct machine *m, uint64_t entry) { return m->frames[(entry & ADDRESS_MASK) >> PAGE_SHIFT]; }

static int index_at(uint64_t gpa, int level) { return (gpa >> (PAGE_SHIFT + 9 * (level - 1))) & (ENTRIES - 1); }

static uint64_t new_frame(struct machine *m)
{
    if (m->used == m->capacity)
        abort(); /* sized for the whole of RAM at creation */
    memset(m->frames[m->used], 0, sizeof m->frames[0]);
    return (uint64_t)m->used++ << PAGE_SHIFT;
}

/* The leaf entry for an address; intermediate tables are made with the given bits if `make` is set. NULL: not there. */
static uint64_t *leaf(struct machine *m, uint64_t root, uint64_t gpa, uint64_t present, int make)
{
    uint64_t *t = table(m, root);
    for (int level = 4; level > 1; level--) {
        uint64_t *e = &t[index_at(gpa, level)];
        if (!(*e & present)) {
            if (!make)
                return NULL;
            *e = new_frame(m) | present;
        }
        t = table(m, *e);
    }
    return &t[index_at(gpa, 1)];
}

void machine_reset(struct machine *m)
{
    m->used = m->kept;
    m->ept_root = new_frame(m);
    for (size_t i = 0; i < TLB_ENTRIES; i++)
        m->tlb[i].tag = NO_TAG;
}

struct machine *machine_new(uint64_t ram_bytes)
{
    struct machine *m = aligned_alloc(64, (sizeof *m + 63) & ~63ull);
    m->ram_pages = ram_bytes >> PAGE_SHIFT;
    m->capacity = 2 * (ram_bytes / (1ull << 21) + ram_bytes / (1ull << 30) + 8);
    m->frames = aligned_alloc(4096, m->capacity * sizeof m->frames[0]);
    m->used = 0;
    m->sppt_root = new_frame(m);
    m->kept = m->used;
    machine_reset(m);
    return m;
}

void machine_free(struct machine *m)
{
    free(m->frames);
    free(m);
}

/* Give a page a map: bit i = sub-page i writable. Call machine_reset afterwards. */
void machine_protect(struct machine *m, uint64_t gfn, uint32_t map)
{
    uint64_t vector = 0;
    for (int i = 0; i < 32; i++)
        vector |= (uint64_t)(map >> i & 1) << 2 * i;
    uint64_t *entry = leaf(m, m->sppt_root, gfn << PAGE_SHIFT, SPPT_VALID, 1);
    /* A vector of zero denies everything; the odd bit 63 stands for "there is a vector" here, and is dropped when it is read. */
    *entry = vector | 1ull << 63;
    m->kept = m->used;
}

/* TLB miss: walk, map on first touch, walk the SPPT for an SPP page. 0: no RAM there. */
static __attribute__((noinline)) int fill(struct machine *m, uint64_t gfn, struct totals *t)
{
    uint64_t gpa = gfn << PAGE_SHIFT;
    t->walks++;
    uint64_t *e = leaf(m, m->ept_root, gpa, EPT_RWX, 0);
    if (!e || !(*e & EPT_RWX)) {
        if (gfn >= m->ram_pages)
            return 0;
        e = leaf(m, m->ept_root, gpa, EPT_RWX, 1);
        uint64_t *s = leaf(m, m->sppt_root, gpa, SPPT_VALID, 0);
        *e = gpa | EPT_WB | (s && *s ? EPT_R | EPT_X | EPT_SPP : EPT_RWX);
        t->mapped++;
    }
    uint32_t writable = ALL_WRITABLE;
    if (!(*e & EPT_W)) {
        writable = 0;
        if (*e & EPT_SPP) {
            uint64_t vector = *leaf(m, m->sppt_root, gpa, SPPT_VALID, 0) & SPPT_WRITE_BITS;
            for (int i = 0; i < 32; i++)
                writable |= (uint32_t)(vector >> 2 * i & 1) << i;
        }
    }
    m->tlb[gfn % TLB_ENTRIES] = (struct tlb_entry){gfn, writable};
    return 1;
}

/* Bytes first..last of a page with SPP, or of one that is not in the TLB. 1: denied. */
static int piece(struct machine *m, uint64_t gfn, unsigned first, unsigned last, int write, struct totals *t, int *granular)
{
    struct tlb_entry *e = &m->tlb[gfn % TLB_ENTRIES];
    if (e->tag != gfn && !fill(m, gfn, t)) {
        t->mmio++;
        return 0;
    }
    if (e->writable == ALL_WRITABLE || !write)
        return 0;
    *granular = 1;
    uint32_t touched = (2u << (last >> SUBPAGE_SHIFT)) - (1u << (first >> SUBPAGE_SHIFT));
    return (touched & ~e->writable) != 0;
}

/* An access that needs more than the look-up below: a TLB miss, or two pages. */
static __attribute__((noinline)) int slow(struct machine *m, const struct record *r, struct totals *t)
{
    uint64_t last = r->gpa + r->size - 1;
    int write = r->access == WRITE, granular = 0, denied;
    if (r->gpa >> PAGE_SHIFT == last >> PAGE_SHIFT) {
        denied = piece(m, r->gpa >> PAGE_SHIFT, r->gpa & 4095, last & 4095, write, t, &granular);
    } else {
        denied = piece(m, r->gpa >> PAGE_SHIFT, r->gpa & 4095, 4095, write, t, &granular);
        denied |= piece(m, last >> PAGE_SHIFT, 0, last & 4095, write, t, &granular);
    }
    t->page_granular += granular;
    return denied;
}

/* Check `count` records. The positions of violating ones are stored, up to `room` of them; all are counted. */
void machine_check(struct machine *m, const struct record *records, size_t count, uint64_t *positions, size_t room, struct totals *out)
{
    struct totals t = {0};
    uint64_t page_granular = 0, violations = 0;
    for (size_t i = 0; i < count; i++) {
        const struct record *r = &records[i];
        uint64_t gpa = r->gpa, gfn = gpa >> PAGE_SHIFT;
        unsigned first = gpa & 4095, last = first + r->size - 1;
        const struct tlb_entry *e = &m->tlb[gfn % TLB_ENTRIES];
        int denied;
        if (UNLIKELY((e->tag ^ gfn) | last >> PAGE_SHIFT)) {
            denied = slow(m, r, &t);
        } else {
            if (e->writable == ALL_WRITABLE || UNLIKELY(r->access != WRITE))
                continue;
            page_granular++;
            uint32_t touched = (2u << (last >> SUBPAGE_SHIFT)) - (1u << (first >> SUBPAGE_SHIFT));
            denied = (touched & ~e->writable) != 0;
        }
        if (UNLIKELY(denied)) {
            if (violations < room)
                positions[violations] = i;
            violations++;
        }
    }
    t.page_granular += page_granular;
    t.violations = violations;
    *out = t;
}

/* The read limit: every word of every record, once. */
uint64_t sum_words(const uint64_t *records, size_t count)
{
    uint64_t total = 0;
    for (size_t i = 0; i < 2 * count; i++)
        total += records[i];
    return total;
}
