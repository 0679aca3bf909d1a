//! Code for tiny kernels that are entered by PVH and wait for their power button.

/// With the start info in EBX: enables the power button by the register that ACPI's tables name, counts at 0x200000
/// until it is pressed, and does what follows, which may use ESI, the FADT.
pub(crate) const WAITS_FOR_THE_BUTTON: &[u8] = &[
    0x8b, 0x7b, 0x20, // mov edi, [ebx + 32]: ACPI's root pointer
    0x8b, 0x77, 0x18, // mov esi, [edi + 24]: the XSDT
    0x8b, 0x76, 0x24, // mov esi, [esi + 36]: the FADT
    0x8b, 0x56, 0x38, // mov edx, [esi + 56]: PM1a events
    0x83, 0xc2, 0x02, // add edx, 2
    0x66, 0xb8, 0x00, 0x01, // mov ax, 0x100
    0x66, 0xef, // out dx, ax
    0x83, 0xea, 0x02, // sub edx, 2
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // next: inc dword [0x200000]
    0x66, 0xed, // in ax, dx
    0xf6, 0xc4, 0x01, // test ah, 1
    0x74, 0xf3, // jz next
];

/// Behind the former: sleep type 5, now.
pub(crate) const SWITCHES_OFF: &[u8] = &[
    0x8b, 0x56, 0x40, // mov edx, [esi + 64]: PM1a control
    0x66, 0xb8, 0x00, 0x34, // mov ax, 0x3400
    0x66, 0xef, // out dx, ax
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
];
