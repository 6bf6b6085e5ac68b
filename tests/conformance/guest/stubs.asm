; Assembly parts of the program: its start, VM entry, and the guest's access stubs.
bits 64
default rel

extern main
extern stack_top
extern bss_start
extern bss_end
global vm_enter
global stubs_start
global stubs_end
global stub_offsets

; ---------------------------------------------------------------------------------------------------------------
section .start progbits alloc exec nowrite align=16

start:  mov     rdi, bss_start
        mov     rcx, bss_end
        sub     rcx, rdi
        xor     eax, eax
        rep     stosb
        mov     rsp, stack_top
        mov     rax, cr4
        or      eax, 0x42000            ; VMXE, OSXSAVE
        mov     cr4, rax
        xor     ecx, ecx
        xor     edx, edx
        mov     eax, 0xe7               ; XCR0: x87, SSE, AVX, AVX-512
        xsetbv
        vpternlogd zmm0, zmm0, zmm0, 0xff
        call    main
.stop:  hlt
        jmp     .stop

; ---------------------------------------------------------------------------------------------------------------
section .text progbits alloc exec nowrite align=16

HOST_RSP equ 0x6c14
HOST_RIP equ 0x6c16

; int vm_enter(linear, value, launched): run the guest with RDI = linear, RAX = value until it exits.
; Returns 0 after an exit, 1 if VM entry failed with an error number, 2 without one. C uses no vector registers:
; ZMM0 keeps the all-ones value that the guest's wide stores write.
vm_enter:
        push    rbx
        push    rbp
        push    r12
        push    r13
        push    r14
        push    r15
        mov     rcx, HOST_RSP
        vmwrite rcx, rsp
        mov     rcx, HOST_RIP
        lea     rbx, [.exit]
        vmwrite rcx, rbx
        mov     rax, rsi
        mov     rcx, rsi
        test    edx, edx
        jnz     .again
        vmlaunch
        jmp     .failed
.again: vmresume
.failed:
        mov     eax, 1
        jz      .done
        mov     eax, 2
        jmp     .done
.exit:  xor     eax, eax
.done:  pop     r15
        pop     r14
        pop     r13
        pop     r12
        pop     rbp
        pop     rbx
        ret

; ---------------------------------------------------------------------------------------------------------------
; Access stubs: copied to the guest's code page, one access at [rdi], then VMCALL. Seven sizes (1 to 64) for each kind.
section .rodata progbits alloc noexec nowrite align=16

stubs_start:
none:   ud2

%macro stub 2+
%1:     %2
        vmcall
%endmacro

        stub    read1, mov al, [rdi]
        stub    read2, mov ax, [rdi]
        stub    read4, mov eax, [rdi]
        stub    read8, mov rax, [rdi]
        stub    read16, movups xmm1, [rdi]
        stub    read32, vmovdqu ymm1, [rdi]
        stub    read64, vmovdqu64 zmm1, [rdi]
        stub    write1, mov [rdi], al
        stub    write2, mov [rdi], ax
        stub    write4, mov [rdi], eax
        stub    write8, mov [rdi], rax
        stub    write16, movups [rdi], xmm0
        stub    write32, vmovdqu [rdi], ymm0
        stub    write64, vmovdqu64 [rdi], zmm0
        stub    add1, add [rdi], al
        stub    add2, add [rdi], ax
        stub    add4, add [rdi], eax
        stub    add8, add [rdi], rax
        stub    locked1, lock add [rdi], al
        stub    locked2, lock add [rdi], ax
        stub    locked4, lock add [rdi], eax
        stub    locked8, lock add [rdi], rax
        stub    xchg1, xchg [rdi], al
        stub    xchg2, xchg [rdi], ax
        stub    xchg4, xchg [rdi], eax
        stub    xchg8, xchg [rdi], rax
        stub    cmpxchg1, lock cmpxchg [rdi], cl
        stub    cmpxchg2, lock cmpxchg [rdi], cx
        stub    cmpxchg4, lock cmpxchg [rdi], ecx
        stub    cmpxchg8, lock cmpxchg [rdi], rcx
        stub    fetch, call rdi
stubs_end:

%macro offsets 1-*
        %rep    %0
        dw      %1 - stubs_start
        %rotate 1
        %endrep
%endmacro

        align   2
stub_offsets:
        offsets read1, read2, read4, read8, read16, read32, read64
        offsets write1, write2, write4, write8, write16, write32, write64
        offsets add1, add2, add4, add8, none, none, none
        offsets locked1, locked2, locked4, locked8, none, none, none
        offsets xchg1, xchg2, xchg4, xchg8, none, none, none
        offsets cmpxchg1, cmpxchg2, cmpxchg4, cmpxchg8, none, none, none
        offsets fetch, fetch, fetch, fetch, none, none, none
