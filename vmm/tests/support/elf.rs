//! Tiny kernels: ELF images with a PVH note, around hand-assembled code.

/// Where tiny guests are loaded and start.
pub(crate) const CODE_ADDRESS: u32 = 0x10_0000;

/// An ELF image with a PVH note around `code`, which starts at CODE_ADDRESS.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const NOTE_OFFSET: u64 = 64 + 2 * 56;
    const CODE_OFFSET: u16 = 0x100;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // executable
    image.extend(62_u16.to_le_bytes()); // x86-64
    image.extend(1_u32.to_le_bytes());
    image.extend(u64::from(CODE_ADDRESS).to_le_bytes());
    image.extend(64_u64.to_le_bytes()); // program headers
    image.extend([0; 12]);
    for word in [64_u16, 56, 2, 0, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    let code_bytes = code.len() as u64;
    let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for word in [offset, address, address, bytes, bytes, 4] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(1, u64::from(CODE_OFFSET), u64::from(CODE_ADDRESS), code_bytes);
    segment(4, NOTE_OFFSET, 0, 20);
    for word in [4_u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0");
    image.extend(CODE_ADDRESS.to_le_bytes());
    image.resize(usize::from(CODE_OFFSET), 0);
    image.extend(code);
    image
}
