//! Tiny kernels for Linux's 64-bit boot protocol: a bzImage, and an ELF image without a PVH note.

use super::tiny_kernel::{CODE_ADDRESS, elf};

/// Where a bzImage's parts are: its setup header's fields, and its protected-mode code.
pub(crate) mod at {
    pub(crate) const SETUP_SECTORS: usize = 0x1f1;
    pub(crate) const SYSSIZE: usize = 0x1f4;
    pub(crate) const BOOT_FLAG: usize = 0x1fe;
    pub(crate) const HEADER_LENGTH: usize = 0x201;
    pub(crate) const MAGIC: usize = 0x202;
    pub(crate) const VERSION: usize = 0x206;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const INITRD_MAX: usize = 0x22c;
    pub(crate) const XLOADFLAGS: usize = 0x236;
    pub(crate) const CMDLINE_SIZE: usize = 0x238;
    pub(crate) const PREF_ADDRESS: usize = 0x258;
    pub(crate) const INIT_SIZE: usize = 0x260;
    pub(crate) const CODE: usize = 1024;
}

/// Room that a tiny bzImage asks for.
pub(crate) const INIT_BYTES: u32 = 0x8_0000;

/// A bzImage whose 64-bit entry is `code`, loaded at CODE_ADDRESS: one sector of setup.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; at::CODE + 0x200];
    image.extend(code);
    image.resize(image.len().next_multiple_of(16), 0x90);
    let syssize = u32::try_from((image.len() - at::CODE) / 16).unwrap();
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(at::SETUP_SECTORS, &[1]);
    set(at::SYSSIZE, &syssize.to_le_bytes());
    set(at::BOOT_FLAG, &[0x55, 0xaa]);
    set(at::HEADER_LENGTH - 1, &[0xeb, 0x6a]);
    set(at::MAGIC, b"HdrS");
    set(at::VERSION, &[0x0f, 0x02]);
    set(at::LOADFLAGS, &[1]);
    set(at::INITRD_MAX, &0x7fff_ffff_u32.to_le_bytes());
    set(at::XLOADFLAGS, &[1, 0]);
    set(at::CMDLINE_SIZE, &2047_u32.to_le_bytes());
    set(at::PREF_ADDRESS, &u64::from(CODE_ADDRESS).to_le_bytes());
    set(at::INIT_SIZE, &INIT_BYTES.to_le_bytes());
    image
}

/// An ELF image whose 64-bit entry is `code`, without a PVH note.
pub(crate) fn elf_without_note(code: &[u8]) -> Vec<u8> {
    let mut image = elf(code);
    // The second program header's type: one that nobody knows.
    image[64 + 56..][..4].copy_from_slice(&0x7000_0000_u32.to_le_bytes());
    image
}
