/*
 * The part of QEMU's TCG plugin interface that the recorder uses, declared here because no distribution packages the
 * header. Source: QEMU's documentation, "QEMU TCG Plugins", and the symbols that qemu-system-x86_64 exports.
 *
 * What is used here is the same in interface 1 (QEMU 4.2 to 8.2) and in interfaces 2 and later (QEMU 9.0 on), so one
 * object serves both; see plugin_version_of_qemu in subpage_capture.c.
 */
#ifndef SUBPAGE_QEMU_PLUGIN_API_H
#define SUBPAGE_QEMU_PLUGIN_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t; /* size, sign, endianness and direction of an access, packed */

struct qemu_plugin_tb;     /* a translated block */
struct qemu_plugin_insn;   /* one instruction of it */
struct qemu_plugin_hwaddr; /* where a linear address led */

typedef struct {
    const char *target_name; /* "x86_64" */
    struct {
        int min; /* the oldest interface that this QEMU takes */
        int cur;
    } version;
    bool system_emulation;
    union {
        struct {
            int smp_vcpus;
            int max_vcpus;
        } system;
    };
} qemu_info_t;

enum { QEMU_PLUGIN_CB_NO_REGS = 0, QEMU_PLUGIN_CB_R_REGS = 1 };
enum { QEMU_PLUGIN_MEM_R = 1, QEMU_PLUGIN_MEM_W = 2, QEMU_PLUGIN_MEM_RW = 3 };

typedef void (*qemu_plugin_udata_cb)(qemu_plugin_id_t, void *);
typedef void (*qemu_plugin_vcpu_simple_cb)(qemu_plugin_id_t, unsigned vcpu);
typedef void (*qemu_plugin_vcpu_udata_cb)(unsigned vcpu, void *);
typedef void (*qemu_plugin_tb_trans_cb)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*qemu_plugin_mem_cb)(unsigned vcpu, qemu_plugin_meminfo_t, uint64_t address, void *);

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, qemu_plugin_tb_trans_cb);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, qemu_plugin_udata_cb, void *);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, qemu_plugin_vcpu_simple_cb);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, qemu_plugin_vcpu_udata_cb, int flags, void *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, qemu_plugin_mem_cb, int flags, int direction, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t);
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t, uint64_t address);
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *);
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *);

/* Only interface 1 has it: where it is missing, its address is null. */
int qemu_plugin_n_vcpus(void) __attribute__((weak));

/* From interface 4 on (QEMU 9.2): what is stored. From 2 on, registers, which come in arrays of GLib, as QEMU uses it. */
typedef struct {
    int type; /* log2 of the bytes */
    union {
        uint64_t low;
        struct {
            uint64_t low, high;
        } u128;
    } data;
} qemu_plugin_mem_value;

struct qemu_plugin_register;
typedef struct {
    struct qemu_plugin_register *handle;
    const char *name, *feature;
} qemu_plugin_reg_descriptor;

typedef struct {
    char *data;
    unsigned len;
} GArray;
typedef struct {
    uint8_t *data;
    unsigned len;
} GByteArray;

qemu_plugin_mem_value qemu_plugin_mem_get_value(qemu_plugin_meminfo_t) __attribute__((weak));
bool qemu_plugin_mem_is_big_endian(qemu_plugin_meminfo_t) __attribute__((weak));
GArray *qemu_plugin_get_registers(void) __attribute__((weak));
int qemu_plugin_read_register(struct qemu_plugin_register *, GByteArray *) __attribute__((weak));
char *g_array_free(GArray *, int with_data) __attribute__((weak));
GByteArray *g_byte_array_new(void) __attribute__((weak));
GByteArray *g_byte_array_set_size(GByteArray *, unsigned) __attribute__((weak));

#endif
