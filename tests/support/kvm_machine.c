/* A machine of KVM with a few instructions of real mode, whose accesses tests/support/kvm_machine.py lists.
 *
 * Memory: 32 KiB at 0. What lies above belongs to nobody: accesses there come here, and reads get zeros.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { MEMORY = 0x8000, CODE = 0x1000 };

static const unsigned char code[] = {
    0xb0, 0x5a,                                           /* mov al, 0x5a */
    0xa2, 0x00, 0x40,                                     /* mov [0x4000], al */
    0xa2, 0x80, 0x50,                                     /* mov [0x5080], al */
    0xa1, 0x00, 0x60,                                     /* mov ax, [0x6000] */
    0xb0, 0x5a,                                           /* mov al, 0x5a */
    0xa2, 0x00, 0x90,                                     /* mov [0x9000], al */
    0xc7, 0x06, 0x04, 0x90, 0x34, 0x12,                   /* mov word [0x9004], 0x1234 */
    0x66, 0xc7, 0x06, 0x08, 0x90, 0x78, 0x56, 0x34, 0x12, /* mov dword [0x9008], 0x12345678 */
    0xa1, 0x00, 0x90,                                     /* mov ax, [0x9000] */
    0x66, 0xff, 0x06, 0x10, 0x90,                         /* inc dword [0x9010] */
    0xf4,                                                 /* hlt */
};

static int failed(const char *what)
{
    perror(what);
    return 1;
}

int main(void)
{
    int kvm = open("/dev/kvm", O_RDWR);
    if (kvm < 0)
        return failed("/dev/kvm");
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        return failed("KVM_CREATE_VM");
    unsigned char *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return failed("mmap");
    memcpy(memory + CODE, code, sizeof code);
    struct kvm_userspace_memory_region slot = {.memory_size = MEMORY, .userspace_addr = (unsigned long)memory};
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
        return failed("KVM_SET_USER_MEMORY_REGION");
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (vcpu < 0)
        return failed("KVM_CREATE_VCPU");
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        return failed("mmap of the vCPU");
    struct kvm_sregs sregs;
    if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
        return failed("KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
        return failed("registers");
    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0)
            return failed("KVM_RUN");
        if (run->exit_reason == KVM_EXIT_HLT)
            return 0;
        if (run->exit_reason != KVM_EXIT_MMIO) {
            fprintf(stderr, "exit reason %u\n", run->exit_reason);
            return 1;
        }
        if (!run->mmio.is_write)
            memset(run->mmio.data, 0, sizeof run->mmio.data);
    }
}
