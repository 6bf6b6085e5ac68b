/*
 * A TCG plugin for qemu-system-x86_64 that hands every store of the guest, with its guest-physical address, to a reader
 * in another process, through a ring in shared memory (ring.h). It slows the guest down rather than lose a record.
 *
 *   -plugin subpage_capture.so,ring=FD,room=FD,data=FD,reader=FD
 *
 * ring: the shared memory. room: the recorder waits at this eventfd for free slots. data: the reader waits at this one
 * for records. reader: a pipe whose other end only the reader has, so that its end is noticed. The reader opened all of
 * them and QEMU inherited them: when the reader has ended, however it did, the shared memory goes; with QEMU, the rest.
 */
#define _GNU_SOURCE
#include "qemu_plugin_api.h"
#include "ring.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define PAGE_SIZE 4096u
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

EXPORT int qemu_plugin_version = 2;

static struct ring_header *ring;
static char *records;
static unsigned record_shift; /* log2 of the bytes of one */
static uint64_t *guards; /* one bit for each 1 << RING_GUARD_SHIFT bytes of guest-physical memory */
static uint64_t guard_count;
static size_t mapped;
static uint64_t capacity;
static unsigned lap_shift;
static int room_fd = -1, data_fd = -1, reader_fd = -1;
static bool several; /* vCPUs run in threads of their own */
static bool wide;    /* records have CR3 and what was stored */
static uint64_t sample; /* of so many stores of a vCPU one is looked at */

static volatile bool recording;
static volatile bool guest_runs;
static uint64_t starts_seen, stops_seen;
static uint64_t free_until; /* tail + capacity as last seen: slots below it are free */
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

/* QEMU reads qemu_plugin_version after it has loaded the object, and takes what lies between its oldest and its newest. */
__attribute__((constructor)) static void plugin_version_of_qemu(void)
{
    if (qemu_plugin_n_vcpus) {
        qemu_plugin_version = 1;
    } else if (qemu_plugin_mem_get_value) {
        qemu_plugin_version = 4;
    }
}

static void say(const char *what)
{
    fprintf(stderr, "subpage capture: %s\n", what);
    fflush(stderr);
}

static void stop_recording(const char *why)
{
    if (__atomic_exchange_n(&recording, false, __ATOMIC_SEQ_CST) && why) {
        say(why);
    }
}

/* ---- the ring */

static void wake_reader(void)
{
    uint64_t one = 1;
    ssize_t done = write(data_fd, &one, sizeof one);
    (void)done; /* a full counter wakes it as well */
}

/* Wait until slot is free. False: nobody reads any more. */
static bool wait_for_room(uint64_t slot)
{
    __atomic_fetch_add(&ring->waits, 1, __ATOMIC_RELAXED);
    for (;;) {
        uint64_t until = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) + capacity;
        if (slot < until) {
            __atomic_store_n(&free_until, until, __ATOMIC_RELAXED);
            return true;
        }
        if (__atomic_load_n(&ring->closed, __ATOMIC_ACQUIRE)) {
            stop_recording(NULL);
            return false;
        }
        wake_reader();
        struct pollfd at[2] = {{.fd = room_fd, .events = POLLIN}, {.fd = reader_fd, .events = POLLIN}};
        if (poll(at, 2, 10) > 0) {
            uint64_t count;
            if (at[1].revents & (POLLHUP | POLLERR | POLLNVAL)) {
                stop_recording("the reader has gone; the guest goes on and is not recorded any more");
                return false;
            }
            if (at[0].revents & POLLIN) {
                ssize_t done = read(room_fd, &count, sizeof count);
                (void)done; /* another vCPU may have taken it: look again */
            }
        }
    }
}

/* Wait until there is a verdict on the record in slot, or nobody left to give one. */
static void wait_for_verdict(uint64_t slot)
{
    wake_reader();
    while (__atomic_load_n(&ring->judged, __ATOMIC_ACQUIRE) <= slot && !__atomic_load_n(&ring->closed, __ATOMIC_ACQUIRE)) {
        struct pollfd at[2] = {{.fd = room_fd, .events = POLLIN}, {.fd = reader_fd, .events = POLLIN}};
        if (poll(at, 2, 5) > 0) {
            uint64_t count;
            if (at[1].revents & (POLLHUP | POLLERR | POLLNVAL)) {
                stop_recording("the reader has gone; the guest goes on and is not recorded any more");
                return;
            }
            if (at[0].revents & POLLIN) {
                ssize_t done = read(room_fd, &count, sizeof count);
                (void)done; /* it may have been meant for another vCPU, which looks again by itself */
            }
        }
    }
}

static bool is_guarded(uint64_t gpa, unsigned size)
{
    uint64_t last = (gpa + size - 1) >> RING_GUARD_SHIFT;
    for (uint64_t at = gpa >> RING_GUARD_SHIFT; at <= last && at < guard_count; at++) {
        if (__atomic_load_n(&guards[at >> 6], __ATOMIC_RELAXED) >> (at & 63) & 1) {
            return true;
        }
    }
    return false;
}

/* One store as the callback is told of it; `value` is all of it. */
struct store {
    qemu_plugin_meminfo_t info;
    uint64_t pc;
    unsigned vcpu, flags;
    uint64_t held; /* the slot of its last record under a guard, + 1 */
    uint64_t cr3;
    uint8_t value[16];
};

/* A record of `size` bytes of a store, those from its byte `from` on. Where nobody reads any more it goes nowhere. */
static inline void append(struct store *store, uint64_t gpa, uint64_t gva, unsigned size, unsigned from)
{
    unsigned flags = store->flags;
    if (unlikely(__atomic_load_n(&ring->guarding, __ATOMIC_RELAXED)) && is_guarded(gpa, size)) {
        flags |= RECORD_HELD;
    }
    uint64_t slot;
    if (several) {
        slot = __atomic_fetch_add(&ring->head, 1, __ATOMIC_RELAXED);
    } else {
        slot = ring->head;
        __atomic_store_n(&ring->head, slot + 1, __ATOMIC_RELAXED);
    }
    if (unlikely(slot >= __atomic_load_n(&free_until, __ATOMIC_RELAXED)) && !wait_for_room(slot)) {
        return;
    }
    struct ring_record *record = (struct ring_record *)(records + ((slot & (capacity - 1)) << record_shift));
    record->gpa = gpa;
    record->gva = gva;
    record->pc = store->pc;
    record->size = (uint8_t)size;
    record->vcpu = (uint8_t)store->vcpu;
    record->flags = (uint8_t)flags;
    if (wide) {
        struct ring_wide_record *more = (struct ring_wide_record *)record;
        more->cr3 = store->cr3;
        memset(more->value, 0, sizeof more->value);
        memcpy(more->value, store->value + from, size <= sizeof more->value - from ? size : sizeof more->value - from);
    }
    __atomic_store_n(&record->lap, (uint32_t)(slot >> lap_shift) + 1, __ATOMIC_RELEASE);
    if (unlikely(flags & RECORD_HELD)) {
        store->held = slot + 1;
    }
    if (unlikely(slot + 1 == __atomic_load_n(&ring->wanted, __ATOMIC_RELAXED))) {
        wake_reader();
    }
}

/* ---- what QEMU calls */

#define MOST_VCPUS 256 /* a record has a byte for their number */

static struct qemu_plugin_register *cr3_handle[MOST_VCPUS];
static GByteArray *cr3_bytes[MOST_VCPUS];

static void on_vcpu(qemu_plugin_id_t id, unsigned vcpu)
{
    (void)id;
    GArray *found = qemu_plugin_get_registers();
    const qemu_plugin_reg_descriptor *each = found ? (const void *)found->data : NULL;
    for (unsigned i = 0; found && vcpu < MOST_VCPUS && i < found->len; i++) {
        if (!strcmp(each[i].name, "cr3")) {
            cr3_bytes[vcpu] = g_byte_array_new();
            cr3_handle[vcpu] = each[i].handle;
        }
    }
    if (found) {
        g_array_free(found, 1);
    }
}

/* Asked of QEMU at each store: besides MOV, task switches, SMM and nested guests change it. */
static uint64_t cr3_of(unsigned vcpu)
{
    uint64_t cr3 = 0;
    if (vcpu < MOST_VCPUS && cr3_handle[vcpu]) {
        g_byte_array_set_size(cr3_bytes[vcpu], 0);
        int size = qemu_plugin_read_register(cr3_handle[vcpu], cr3_bytes[vcpu]);
        if (size > 0) {
            memcpy(&cr3, cr3_bytes[vcpu]->data, size < 8 ? (size_t)size : 8);
        }
    }
    return cr3;
}

/* What is stored, in the order of memory. */
static void take_value(struct store *store, unsigned size)
{
    qemu_plugin_mem_value told = qemu_plugin_mem_get_value(store->info);
    memset(store->value, 0, sizeof store->value);
    memcpy(store->value, &told.data, size < sizeof store->value ? size : sizeof store->value);
    if (qemu_plugin_mem_is_big_endian(store->info) && size <= sizeof store->value) {
        for (unsigned i = 0; i < size / 2; i++) {
            uint8_t kept = store->value[i];
            store->value[i] = store->value[size - 1 - i];
            store->value[size - 1 - i] = kept;
        }
    }
}

/* A cache line for each: vCPUs count at once. */
static struct {
    _Alignas(64) uint64_t left; /* stores to pass over before the next one that is looked at */
} passing[MOST_VCPUS];

/* Counted by what each vCPU stores, so that the same guest gives the same sample. */
static bool is_passed_over(unsigned vcpu)
{
    uint64_t *left = &passing[vcpu % MOST_VCPUS].left;
    if (*left) {
        --*left;
        return true;
    }
    *left = sample - 1;
    return false;
}

static void one_page(struct store *store, uint64_t gva, unsigned size, unsigned from)
{
    struct qemu_plugin_hwaddr *where = qemu_plugin_get_hwaddr(store->info, gva);
    if (unlikely(!where)) {
        __atomic_fetch_add(&ring->unknown, 1, __ATOMIC_RELAXED);
        return;
    }
    if (unlikely(qemu_plugin_hwaddr_is_io(where))) {
        __atomic_fetch_add(&ring->devices, 1, __ATOMIC_RELAXED);
        return;
    }
    uint64_t gpa = qemu_plugin_hwaddr_phys_addr(where);
    if (unlikely(gpa + size <= ring->low_gpa || gpa >= ring->high_gpa)) {
        __atomic_fetch_add(&ring->elsewhere, 1, __ATOMIC_RELAXED);
        return;
    }
    append(store, gpa, gva, size, from);
}

static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t gva, void *instruction)
{
    if (unlikely(!recording)) {
        return;
    }
    /* QEMU 7.2 calls for loads of such an instruction, too. */
    if (!qemu_plugin_mem_is_store(info)) {
        if (unlikely(!several)) {
            ring->loads++;
        }
        return;
    }
    if (unlikely(sample > 1) && is_passed_over(vcpu)) {
        return;
    }
    uint64_t pc = (uint64_t)(uintptr_t)instruction;
    unsigned size = 1u << qemu_plugin_mem_size_shift(info);
    unsigned room = PAGE_SIZE - (unsigned)(gva & (PAGE_SIZE - 1));
    struct store store;
    store.info = info, store.pc = pc, store.vcpu = vcpu, store.flags = pc >> 63 ? RECORD_KERNEL : 0, store.held = 0;
    if (wide) {
        store.cr3 = cr3_of(vcpu);
        take_value(&store, size);
    }
    if (unlikely(size > room)) {
        /* One call with the address of the first byte; the second page may lie anywhere. */
        __atomic_fetch_add(&ring->split, 1, __ATOMIC_RELAXED);
        store.flags |= RECORD_SPLIT;
        one_page(&store, gva, room, 0);
        one_page(&store, gva + room, size - room, room);
    } else {
        one_page(&store, gva, size, 0);
    }
    if (unlikely(store.held)) {
        wait_for_verdict(store.held - 1);
    }
}

static void on_start(unsigned vcpu, void *unused)
{
    (void)vcpu;
    (void)unused;
    pthread_mutex_lock(&starting);
    if (ring->state == RING_LOADED && ++starts_seen == ring->start_n) {
        __atomic_store_n(&ring->state, RING_STARTED, __ATOMIC_RELEASE);
        recording = true;
        wake_reader();
    }
    pthread_mutex_unlock(&starting);
}

static void on_stop(unsigned vcpu, void *unused)
{
    (void)vcpu;
    (void)unused;
    pthread_mutex_lock(&starting);
    if (recording && ++stops_seen == ring->stop_n) {
        recording = false;
        __atomic_store_n(&ring->state, RING_STOPPED, __ATOMIC_RELEASE);
        wake_reader();
    }
    pthread_mutex_unlock(&starting);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    guest_runs = true;
    size_t count = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        uint64_t pc = qemu_plugin_insn_vaddr(instruction);
        if (ring->start_pc && pc == ring->start_pc) {
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_start, QEMU_PLUGIN_CB_NO_REGS, NULL);
        }
        if (ring->stop_pc && pc == ring->stop_pc) {
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_stop, QEMU_PLUGIN_CB_NO_REGS, NULL);
        }
        qemu_plugin_register_vcpu_mem_cb(
            instruction, on_access, wide ? QEMU_PLUGIN_CB_R_REGS : QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_W, (void *)(uintptr_t)pc);
    }
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *unused)
{
    (void)id;
    (void)unused;
    recording = false;
    if (ring->state != RING_STOPPED) {
        __atomic_store_n(&ring->state, RING_ENDED, __ATOMIC_RELEASE);
    }
    wake_reader();
}

/* ---- the reader's end */

/* A thread. A guest that stands still because its reader was about to look at it would do so for ever. */
static void *wait_for_end_of_reader(void *unused)
{
    struct pollfd at = {.fd = reader_fd, .events = POLLIN};
    while (poll(&at, 1, -1) < 0 && errno == EINTR) {
    }
    if (!guest_runs) {
        say("the reader has gone before the guest ran");
        _exit(1);
    }
    stop_recording("the reader has gone; the guest goes on and is not recorded any more");
    /* The ring's memory goes, and zeros are there for a vCPU that is just looking: nothing is guarded, or begins. */
    void *none = mmap(ring, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    (void)none; /* where that fails it goes with QEMU */
    return unused;
}

static bool watch_reader(void)
{
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are QEMU's */
    int failed = pthread_create(&thread, NULL, wait_for_end_of_reader, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !failed && !pthread_detach(thread);
}

/* ---- loading */

static int refuse(const char *why)
{
    say(why);
    return -1;
}

static bool take_argument(const char *argument)
{
    static const struct {
        const char *name;
        int *fd;
    } known[] = {{"ring=", NULL}, {"room=", &room_fd}, {"data=", &data_fd}, {"reader=", &reader_fd}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t length = strlen(known[i].name);
        if (strncmp(argument, known[i].name, length)) {
            continue;
        }
        int fd = atoi(argument + length);
        if (known[i].fd) {
            *known[i].fd = fd;
            return true;
        }
        struct stat found;
        if (fstat(fd, &found) || found.st_size < RING_HEADER_BYTES) {
            return false;
        }
        void *at = mmap(NULL, (size_t)found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (at == MAP_FAILED) {
            return false;
        }
        ring = at;
        records = (char *)at + RING_HEADER_BYTES;
        mapped = (size_t)found.st_size;
        return true;
    }
    return false;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (!take_argument(argv[i])) {
            return refuse("takes ring=, room=, data= and reader= with the descriptors that `subpage record` opens");
        }
    }
    if (!ring || room_fd < 0 || data_fd < 0 || reader_fd < 0) {
        return refuse("is started by `subpage record` and `subpage live`, not by hand");
    }
    capacity = ring->capacity;
    sample = ring->sample;
    wide = ring->version == RING_VERSION && ring->wide;
    size_t record_bytes = wide ? sizeof(struct ring_wide_record) : sizeof(struct ring_record);
    if (ring->magic != RING_MAGIC || ring->version != RING_VERSION || ring->record_bytes != record_bytes ||
        !capacity || capacity & (capacity - 1) || capacity > mapped / record_bytes ||
        mapped != RING_HEADER_BYTES + capacity * record_bytes + ring->guard_bytes) {
        return refuse("was built for another version of its reader: run `make plugin` again");
    }
    if (!info->system_emulation || strcmp(info->target_name, "x86_64")) {
        return refuse("records x86-64 machines (qemu-system-x86_64) only");
    }
    if (wide && (!qemu_plugin_mem_get_value || !qemu_plugin_mem_is_big_endian || !qemu_plugin_get_registers ||
                 !qemu_plugin_read_register || !g_array_free || !g_byte_array_new || !g_byte_array_set_size)) {
        return refuse("this QEMU tells plugins neither CR3 nor what is stored (--values): QEMU 10 does");
    }
    if (!watch_reader()) {
        return refuse("could not start a thread");
    }
    several = info->system.max_vcpus > 1;
    lap_shift = (unsigned)__builtin_ctzll(capacity);
    free_until = capacity;
    record_shift = (unsigned)__builtin_ctzll(record_bytes);
    guards = (uint64_t *)(records + (capacity << record_shift));
    guard_count = ring->guard_bytes / sizeof *guards * 64;
    ring->several = several;
    ring->interface = (uint32_t)qemu_plugin_version;
    __atomic_store_n(&ring->state, ring->start_pc ? RING_LOADED : RING_STARTED, __ATOMIC_RELEASE);
    recording = !ring->start_pc;
    if (wide) {
        qemu_plugin_register_vcpu_init_cb(id, on_vcpu);
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
