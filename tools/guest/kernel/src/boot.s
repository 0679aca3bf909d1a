# Everything that runs in ring 0: the way from PVH's 32-bit entry to ring 3, and the trap handlers.
#
# On the PVM back end of KVM ring 0 is interpreted at about a million instructions a second, and the
# interpreter knows neither SSE nor much else. So the tables are laid out by the assembler, not at run time,
# and whatever ring 3 can do (filling the IDT, mapping more memory) is left to it.

.set USER_CODE, 0x33            # the selectors are Linux's, which PVM expects of a native ring 3
.set USER_DATA, 0x2b

.section .report, "aw", @progbits
.global report_page
report_page:
    .zero 4096

# XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader jumps to.
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax", @progbits
.code32
.global pvh_entry
pvh_entry:                      # 32-bit protected mode, no paging; ebx = start_info
    cld
    mov edi, ebx
    mov eax, 0x620              # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER: LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80010033         # CR0: PG, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                  # far jump to 64-bit code
    .long long_mode
    .word 0x10

.code64
long_mode:
    mov eax, 0x18
    mov ss, eax
    mov rsp, offset ring0_stack_top
    mov edi, edi
    lidt [idt_pointer]
    mov eax, offset tss         # the assembler can't split an address over a TSS descriptor
    mov [gdt + 0x42], ax
    shr eax, 16
    mov [gdt + 0x44], al
    mov [gdt + 0x47], ah
    mov eax, 0x40
    ltr ax
    push USER_DATA
    push offset ring3_stack_top
    push 2                      # RFLAGS: interrupts stay off outside the halt below
    push USER_CODE
    push offset ring3_entry
    iretq

ring3_entry:                    # rdi = start_info; rsp is 16-aligned, as before a call
    xor ebp, ebp
    call guest_main
    ud2

ring3_fault:
    xor ebp, ebp
    call guest_fault
    ud2

# #GP: ring 3 asks for a halt (hlt) or a byte to a port (out dx, al) by just executing it.
.global trap_gp
trap_gp:                        # [rsp]: error code, rip, cs, rflags, rsp, ss
    push rax
    mov rax, [rsp + 16]
    cmp byte ptr [rax], 0xf4
    jne 1f
    sti                         # interrupts are taken here and nowhere else
    hlt
    cli
    inc qword ptr [rsp + 16]
    pop rax
    add rsp, 8
    iretq
1:  cmp byte ptr [rax], 0xee
    jne 2f
    pop rax
    out dx, al
    inc qword ptr [rsp + 8]
    add rsp, 8
    iretq
2:  pop rax
    push 13
    jmp fault

# Interrupts: the LAPIC timer and the network device. Waking the halt is all they are for.
.global trap_net
trap_net:
    inc dword ptr [net_interrupts]
.global trap_timer
trap_timer:
    push rax
    mov eax, 0xfee000b0         # LAPIC end of interrupt
    mov dword ptr [rax], 0
    pop rax
.global trap_spurious
trap_spurious:
    iretq

# Exceptions: note what happened in the report page, then let ring 3 print it.
.macro exception vector, has_code
    .balign 16
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp fault
.endm

.balign 16
.global trap_exceptions
trap_exceptions:
    .irp vector, 0,1,2,3,4,5,6,7
    exception \vector, 0
    .endr
    exception 8, 1
    exception 9, 0
    .irp vector, 10,11,12,13,14
    exception \vector, 1
    .endr
    exception 15, 0
    exception 16, 0
    exception 17, 1
    .irp vector, 18,19,20
    exception \vector, 0
    .endr
    exception 21, 1
    .irp vector, 22,23,24,25,26,27,28
    exception \vector, 0
    .endr
    exception 29, 1
    exception 30, 1
    exception 31, 0

.balign 16
fault:                          # [rsp]: vector, error code, rip, cs, rflags, rsp, ss
    cmp qword ptr [{report} + {fault_vector}], 0
    jne dead                    # a fault while reporting one
    pop rax
    inc rax
    mov [{report} + {fault_vector}], rax
    pop rax
    mov [{report} + {fault_error}], rax
    mov rax, [rsp]
    mov [{report} + {fault_rip}], rax
    mov rax, cr2
    mov [{report} + {fault_cr2}], rax
    test byte ptr [rsp + 8], 3
    jz dead                     # ring 0 itself faulted: nobody is left to print it
    mov qword ptr [rsp], offset ring3_fault
    mov rax, offset fault_stack_top
    mov [rsp + 24], rax
    iretq
dead:
    mov dword ptr [{report} + {stage}], {faulted}
1:  cli
    hlt
    jmp 1b

.section .tables, "aw", @progbits
.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 0x08 32-bit code
    .quad 0x00af9b000000ffff    # 0x10 64-bit code
    .quad 0x00cf93000000ffff    # 0x18 data
    .quad 0x00cffb000000ffff    # 0x23 32-bit code, ring 3
    .quad 0x00cff3000000ffff    # 0x2b data, ring 3
    .quad 0x00affb000000ffff    # 0x33 64-bit code, ring 3
    .quad 0
    .quad 0x0000890000000067    # 0x40 TSS, base filled in above
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .long 0
.balign 8
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
.balign 8
tss:
    .long 0
    .quad ring0_stack_top
    .zero 92

# The first 4 GiB, identity-mapped with 2 MiB pages: present, writable, user, accessed, dirty.
.balign 4096
page_map:
    .quad page_map_512g + 0x27
    .zero 4088
.global page_map_512g
page_map_512g:
    .quad page_map_1g + 0x27
    .quad page_map_1g + 0x1027
    .quad page_map_1g + 0x2027
    .quad page_map_1g + 0x3027
    .zero 4064
page_map_1g:
    .set address, 0
    .rept 2048
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr

.section .bss.boot, "aw", @nobits
.balign 4096
.global idt
idt:
    .zero 4096
.global net_interrupts
net_interrupts:
    .zero 4096
    .zero 4096
ring0_stack_top:
    .zero 0x4000
fault_stack_top:
    .zero 0x20000
ring3_stack_top:
