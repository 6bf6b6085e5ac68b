; Boot sector: loads the program behind it, enters long mode with the first 4 GiB identity-mapped, jumps to it.
; The builder passes PAYLOAD_SECTORS; the program is linked at PAYLOAD.
bits 16
org 0x7c00

PAYLOAD equ 0x10000
PML4    equ 0x1000
PDPT    equ 0x2000

boot:   cli
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7c00
        cld
        mov     si, packet
        mov     ah, 0x42                ; extended read, DL = boot disk
        int     0x13
        jc      hang

        mov     di, PML4                ; both tables zeroed in one go
        mov     cx, 0x1000
        xor     ax, ax
        rep     stosw
        mov     word [PML4], PDPT | 3
        mov     eax, 0x83               ; four 1-GByte pages
        mov     di, PDPT
        mov     cx, 4
.page:  mov     [di], eax
        add     di, 8
        add     eax, 0x40000000
        loop    .page

        in      al, 0x92                ; A20
        or      al, 2
        and     al, 0xfe
        out     0x92, al
        lgdt    [gdtr]
        mov     eax, 0x620              ; PAE, OSFXSR, OSXMMEXCPT
        mov     cr4, eax
        mov     eax, PML4
        mov     cr3, eax
        mov     ecx, 0xc0000080         ; EFER: LME, NXE
        rdmsr
        or      eax, 0x900
        wrmsr
        mov     eax, 0x80010033         ; PG, WP, NE, ET, MP, PE
        mov     cr0, eax
        jmp     8:long_mode

hang:   hlt
        jmp     hang

bits 64
long_mode:
        mov     ax, 16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     fs, ax
        mov     gs, ax
        mov     rax, PAYLOAD
        jmp     rax

        align   8
gdt:    dq      0
        dq      0x00209b0000000000      ; 8: 64-bit code
        dq      0x00cf93000000ffff      ; 16: data
        dq      0x00008b0000000067      ; 24: TSS, so that the host TR selector is not null
        dq      0
gdtr:   dw      gdtr - gdt - 1
        dd      gdt

        times   494 - ($ - $$) db 0
packet: db      16, 0
        dw      PAYLOAD_SECTORS         ; at 0x7df0: the program finds the vector image behind itself with it
        dw      0, PAYLOAD >> 4         ; offset, segment
        dq      1
        dw      0xaa55
