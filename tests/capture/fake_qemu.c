/* What the recorder needs of QEMU: the plugin interface, and stores that a test asks for. Built with INTERFACE_1 it is
 * as old as QEMU 7.2, with INTERFACE_2 as 9.0, which tells nothing of what is stored. */
#define _GNU_SOURCE
#include "../../capture/qemu_plugin_api.h"
#include "../../capture/ring.h"

#include <pthread.h>
#include <stddef.h>

enum { STORE = 1 << 8, DEVICE = 1 << 9, UNKNOWN = 1 << 10, SWAPPED = 1 << 11 }; /* beside log2 of the size */

struct qemu_plugin_insn {
    uint64_t pc;
    qemu_plugin_mem_cb access;
    void *access_data;
    qemu_plugin_vcpu_udata_cb run;
    void *run_data;
};
struct qemu_plugin_tb {
    struct qemu_plugin_insn only;
};
struct qemu_plugin_hwaddr {
    uint64_t gpa;
    bool device;
};

static qemu_plugin_tb_trans_cb translate;
static qemu_plugin_udata_cb at_exit;
static __thread struct qemu_plugin_tb block;
static __thread struct qemu_plugin_hwaddr where;

#ifdef INTERFACE_1
int qemu_plugin_n_vcpus(void) { return 1; }
#elif !defined(INTERFACE_2)
/* It stores the same bytes each time, under a CR3 for each vCPU. */
static __thread struct { qemu_plugin_reg_descriptor only; } registers;
static __thread GArray listed;
static __thread GByteArray bytes;
static __thread uint64_t cr3;
qemu_plugin_mem_value qemu_plugin_mem_get_value(qemu_plugin_meminfo_t info)
{
    return (qemu_plugin_mem_value){.type = info & 0xFF, .data.u128 = {0x1122334455667788, 0x99AABBCCDDEEFF00}};
}
bool qemu_plugin_mem_is_big_endian(qemu_plugin_meminfo_t info) { return info & SWAPPED; }
GArray *qemu_plugin_get_registers(void)
{
    registers.only = (qemu_plugin_reg_descriptor){(void *)&registers, "cr3", "org.gnu.gdb.i386.core"};
    listed = (GArray){(char *)&registers, 1};
    return &listed;
}
int qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *into)
{
    cr3 = 0x1234000;
    into->data = (uint8_t *)&cr3;
    return sizeof cr3;
}
char *g_array_free(GArray *array, int with_data) { return NULL; }
GByteArray *g_byte_array_new(void) { return &bytes; }
GByteArray *g_byte_array_set_size(GByteArray *array, unsigned size) { return array; }
#endif
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_simple_cb cb) { cb(id, 0); }
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, qemu_plugin_tb_trans_cb cb) { translate = cb; }
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, qemu_plugin_udata_cb cb, void *data) { at_exit = cb; }
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *i, qemu_plugin_vcpu_udata_cb cb, int f, void *data)
{
    i->run = cb;
    i->run_data = data;
}
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *i, qemu_plugin_mem_cb cb, int f, int rw, void *data)
{
    i->access = cb;
    i->access_data = data;
}
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb) { return 1; }
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i)
{
    return &((struct qemu_plugin_tb *)tb)->only;
}
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *i) { return i->pc; }
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t info) { return info & 0xFF; }
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t info) { return info & STORE; }
/* Neighbouring pages lie apart, the other way round. */
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t info, uint64_t gva)
{
    where.gpa = (gva & 0x3FFFFFFF) ^ 0x1000;
    where.device = info & DEVICE;
    return info & UNKNOWN ? NULL : &where;
}
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *h) { return h->device; }
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *h) { return h->gpa; }

/* An instruction at pc runs and makes one access. */
void fake_access(unsigned vcpu, unsigned info, uint64_t gva, uint64_t pc)
{
    if (block.only.pc != pc) {
        block.only = (struct qemu_plugin_insn){.pc = pc};
        translate(1, &block);
    }
    if (block.only.run) {
        block.only.run(vcpu, block.only.run_data);
    }
    block.only.access(vcpu, info, gva, block.only.access_data);
}

static uint64_t each;
static void *one_vcpu(void *number)
{
    unsigned vcpu = (unsigned)(uintptr_t)number;
    for (uint64_t i = 0; i < each; i++) {
        fake_access(vcpu, STORE | 3, 0x100000 + 8 * (i & 0xFFFF), 0x1000 + i);
    }
    return NULL;
}

/* Each of some vCPUs, in a thread of its own, makes so many stores; the pc counts them. */
void fake_run(unsigned vcpus, uint64_t count)
{
    pthread_t threads[64];
    each = count;
    for (uintptr_t v = 0; v < vcpus; v++) {
        pthread_create(&threads[v], NULL, one_vcpu, (void *)v);
    }
    for (unsigned v = 0; v < vcpus; v++) {
        pthread_join(threads[v], NULL);
    }
}

void fake_end(void) { at_exit(1, NULL); }

/* Offsets of words of the header and of a record, for the test that compares ring.h with layout.py. */
const uint64_t fake_offsets[] = {
    RING_MAGIC,
    offsetof(struct ring_header, capacity),
    offsetof(struct ring_header, high_gpa),
    offsetof(struct ring_header, head),
    offsetof(struct ring_header, interface),
    offsetof(struct ring_header, loads),
    offsetof(struct ring_header, tail),
    offsetof(struct ring_header, closed),
    offsetof(struct ring_header, guard_bytes),
    offsetof(struct ring_header, judged),
    offsetof(struct ring_header, sample),
    offsetof(struct ring_header, guarding),
    offsetof(struct ring_record, size),
    offsetof(struct ring_record, lap),
};
