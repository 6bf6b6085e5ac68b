/*
 * The shared memory between the recorder in QEMU (which writes) and its reader (which made it): a page of words, then
 * records, then guards. capture/layout.py has the same numbers; a test compares them. All little-endian.
 *
 * A record belongs to the slot that its vCPU took from `head`; the order of slots is the order of the trace. It is
 * complete when `lap` is the lap of its slot, which is written last: head / capacity + 1. The reader sets `tail` to the
 * first slot that it has not read, and a vCPU that finds no free slot waits for that: nothing is ever dropped.
 *
 * Guards are a bit for each 128 bytes of guest-physical memory. A vCPU that stores to where one is set goes on when
 * `judged` is beyond the slot of its record.
 */
#ifndef SUBPAGE_RING_H
#define SUBPAGE_RING_H

#include <stdint.h>

#define RING_MAGIC 0x31474E4952425553ull /* "SUBRING1" */
#define RING_VERSION 4u
#define RING_HEADER_BYTES 4096

enum ring_state { RING_MADE = 0, RING_LOADED = 1, RING_STARTED = 2, RING_ENDED = 3, RING_STOPPED = 4 };

struct ring_header {
    /* written by the reader before QEMU starts */
    uint64_t magic;
    uint32_t version;
    uint32_t record_bytes;
    uint64_t capacity; /* records; a power of two */
    uint64_t start_pc; /* record from the instruction at this address on; 0: from the beginning */
    uint64_t start_n;  /* and from the n-th time that it runs, at least 1 */
    uint64_t low_gpa;  /* record stores at these guest-physical addresses only: low <= gpa < high */
    uint64_t high_gpa;
    uint64_t guard_bytes; /* after the records */
    uint64_t stop_pc;     /* record until the instruction at this address runs; 0: to the end */
    uint64_t stop_n;      /* until the n-th time since recording began, at least 1 */
    uint64_t wide;        /* not 0: records are of 64 bytes, with CR3 and what was stored */
    uint64_t sample;      /* of so many stores of a vCPU the first one is recorded; 0 and 1: all */
    uint64_t reserved[3];

    /* written by the recorder when it is loaded */
    uint32_t several; /* vCPUs fill slots at once: the last one that is complete is not the last that was taken */
    uint32_t reserved1;

    /* written by the recorder: one cache line */
    uint64_t head; /* slots taken */
    uint32_t state;
    uint32_t interface; /* the plugin interface that was agreed on */
    uint64_t waits;     /* times that a vCPU waited for a free slot */
    uint64_t elsewhere; /* stores that the filter of addresses left out */
    uint64_t devices;   /* stores to devices: no guest memory, not recorded */
    uint64_t unknown;   /* stores whose guest-physical address QEMU did not know, not recorded */
    uint64_t split;     /* stores over two pages: two records each */
    uint64_t loads;     /* loads that QEMU reported though stores were asked for */

    /* written by the reader: one cache line */
    uint64_t tail;     /* slots read */
    uint64_t wanted;   /* the reader sleeps until head is here */
    uint64_t closed;   /* not 0: the reader takes no more, the guest goes on unrecorded */
    uint64_t judged;   /* of slots below there is a verdict */
    uint64_t guarding; /* not 0: some guard may be set */
    uint64_t reserved2[3];
};

#define RECORD_KERNEL 1 /* the instruction lies in the upper half */
#define RECORD_SPLIT 2  /* part of a store over two pages */
#define RECORD_HELD 4   /* the vCPU waits for a verdict on it */

#define RING_GUARD_SHIFT 7

struct ring_record {
    uint64_t gpa;
    uint64_t gva;
    uint64_t pc;
    uint8_t size;
    uint8_t vcpu;
    uint8_t flags;
    uint8_t reserved;
    uint32_t lap;
};

struct ring_wide_record {
    struct ring_record record;
    uint64_t cr3;
    uint8_t value[16]; /* the first `size` bytes, as they are in memory */
    uint64_t reserved;
};

_Static_assert(sizeof(struct ring_wide_record) == 64, "ring_wide_record");
_Static_assert(sizeof(struct ring_header) == 256, "ring_header");
_Static_assert(sizeof(struct ring_record) == 32, "ring_record");

#endif
