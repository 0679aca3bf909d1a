//! What can be loaded, and what can't and why.

use std::fs;

use super::*;
use crate::config::{Backing, Kernel, MemoryConfig};
use crate::memory::{self, PAGE_BYTES};
use crate::tiny_kernel::{CODE_ADDRESS, elf as tiny_elf};

const MEMORY_BYTES: u64 = 8 << 20;
const CODE: &[u8] = &[0xf4, 0xeb, 0xfd];

fn ram() -> GuestRam {
    memory::allocate(&MemoryConfig::new(MEMORY_BYTES, Backing::PrivateAnonymous)).unwrap()
}

/// Loads an image from a file, with an initial RAM disk of `initrd_bytes` if there are any.
fn load_bytes(ram: &GuestRam, image: &[u8], cmdline: &str, initrd_bytes: usize) -> Result<Entry, BootError> {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, image).unwrap();
    let initrd = directory.path().join("initrd");
    fs::write(&initrd, vec![0x77; initrd_bytes]).unwrap();
    let boot = BootSource {
        kernel: Kernel::File(kernel),
        initrd: (initrd_bytes > 0).then_some(initrd),
        cmdline: cmdline.into(),
    };
    load(ram, 2, &boot, &["virtio_mmio.device=4K@0xd0000000:5".into()])
}

fn refusal(image: &[u8]) -> String {
    let error = load_bytes(&ram(), image, "", 0).unwrap_err().to_string();
    assert!(error.contains("vmlinux"), "the file is not named: {error}");
    error
}

fn read<const BYTES: usize>(ram: &GuestRam, address: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    ram.tracked().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn read_u64(ram: &GuestRam, address: u64) -> u64 {
    u64::from_le_bytes(read(ram, address))
}

/// Offsets in an ELF image: a program header's fields, and the first two headers.
const SEGMENT_LOAD: usize = 64;
const SEGMENT_NOTE: usize = 64 + 56;
const FIELD_OFFSET: usize = 8;
const FIELD_ADDRESS: usize = 24;
const FIELD_FILE_BYTES: usize = 32;
const FIELD_MEMORY_BYTES: usize = 40;

fn patched(at: usize, value: u64) -> Vec<u8> {
    let mut image = tiny_elf(CODE);
    image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    image
}

#[test]
fn a_kernel_finds_its_code_command_line_and_initial_ram_disk() {
    let ram = ram();
    let entry = load_bytes(&ram, &tiny_elf(CODE), "console=ttyS0", 5000).unwrap();
    assert_eq!(entry.address, u64::from(CODE_ADDRESS));
    assert_eq!(&read::<3>(&ram, entry.address), CODE);
    assert_eq!(read::<4>(&ram, entry.start_info), 0x336e_c578_u32.to_le_bytes());

    let cmdline = read_u64(&ram, entry.start_info + 24);
    let expected = b"console=ttyS0 virtio_mmio.device=4K@0xd0000000:5\0";
    assert_eq!(&read::<49>(&ram, cmdline), expected);

    let modules = read_u64(&ram, entry.start_info + 16);
    let (address, bytes) = (read_u64(&ram, modules), read_u64(&ram, modules + 8));
    assert_eq!(bytes, 5000);
    assert_eq!(address, (MEMORY_BYTES - 5000) / PAGE_BYTES as u64 * PAGE_BYTES as u64);
    assert_eq!(read::<5000>(&ram, address), [0x77; 5000]);
    assert_eq!(&read::<4>(&ram, BASE_MEMORY_END), b"_MP_");
}

#[test]
fn the_pvh_note_is_found_between_other_notes() {
    // Three program headers: the code, the notes, and notes without an entry behind them.
    const SEGMENT_BYTES: usize = 56;
    const NOTES: usize = 64 + 3 * SEGMENT_BYTES;
    let tiny = tiny_elf(CODE);
    let mut image = tiny[..SEGMENT_NOTE + SEGMENT_BYTES].to_vec();
    image[56..58].copy_from_slice(&3_u16.to_le_bytes());
    image.extend_from_within(SEGMENT_NOTE..);
    // An empty name and five bytes, padded; then the entry's note; then the first again.
    let other = [&[0, 0, 0, 0, 5, 0, 0, 0, 18, 0, 0, 0][..], &[7; 8]].concat();
    let notes = [&other[..], &tiny[SEGMENT_NOTE + SEGMENT_BYTES..][..20], &other].concat();
    for (segment, offset, bytes) in [(0, NOTES, 40_u64), (1, NOTES + 40, 20)] {
        let at = SEGMENT_NOTE + segment * SEGMENT_BYTES;
        image[at + FIELD_OFFSET..][..8].copy_from_slice(&(offset as u64).to_le_bytes());
        image[at + FIELD_FILE_BYTES..][..8].copy_from_slice(&bytes.to_le_bytes());
    }
    image.extend(notes);
    let code = image.len() as u64;
    image[SEGMENT_LOAD + FIELD_OFFSET..][..8].copy_from_slice(&code.to_le_bytes());
    image.extend(CODE);
    let entry = load_bytes(&ram(), &image, "", 0).unwrap();
    assert_eq!(entry.address, u64::from(CODE_ADDRESS));
}

#[test]
fn what_is_not_bootable_is_refused_with_file_and_cause() {
    assert!(refusal(b"").contains("too few"));
    assert!(refusal(&[0x90; 4096]).contains("not an ELF image"));
    let mut no_note = tiny_elf(CODE);
    no_note[SEGMENT_NOTE..SEGMENT_NOTE + 4].copy_from_slice(&0_u32.to_le_bytes());
    assert!(refusal(&no_note).contains("no PVH entry"));
    let mut for_arm = tiny_elf(CODE);
    for_arm[18] = 183;
    assert!(refusal(&for_arm).contains("64-bit x86"));
    let whole = tiny_elf(CODE);
    for length in [70, 120, whole.len() - 1] {
        assert!(refusal(&whole[..length]).contains("truncated"), "{length} bytes");
    }
    assert!(refusal(&patched(SEGMENT_LOAD + FIELD_OFFSET, u64::MAX)).contains("impossible"));
    assert!(refusal(&patched(SEGMENT_LOAD + FIELD_ADDRESS, 0x7000)).contains("below 1 MiB"));
    assert!(refusal(&patched(SEGMENT_LOAD + FIELD_MEMORY_BYTES, 1)).contains("longer in the file"));
    assert!(refusal(&patched(SEGMENT_NOTE + FIELD_FILE_BYTES, 1 << 40)).contains("truncated"));
}

#[test]
fn too_much_for_the_memory_is_refused_with_the_figures() {
    let too_big =
        load_bytes(&ram(), &patched(SEGMENT_LOAD + FIELD_MEMORY_BYTES, 64 << 20), "", 0).unwrap_err();
    assert!(
        matches!(too_big, BootError::KernelTooBig { available: MEMORY_BYTES, needed: 0x410_0000, .. }),
        "{too_big}"
    );
    let initrd = load_bytes(&ram(), &tiny_elf(CODE), "", 7 << 20).unwrap_err();
    assert!(
        matches!(initrd, BootError::InitrdTooBig { bytes: 0x70_0000, available: 0x6f_f000, .. }),
        "{initrd}"
    );
}

#[test]
fn missing_files_and_impossible_command_lines_are_named() {
    let missing = |kernel: &str, initrd: Option<&str>| {
        let boot = BootSource {
            kernel: Kernel::File(kernel.into()),
            initrd: initrd.map(Into::into),
            cmdline: String::new(),
        };
        load(&ram(), 1, &boot, &[]).unwrap_err().to_string()
    };
    assert!(missing("/nonexistent/vmlinux", None).contains("/nonexistent/vmlinux"));
    assert!(missing("/tmp", None).contains("/tmp"));
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, tiny_elf(CODE)).unwrap();
    let error = missing(kernel.to_str().unwrap(), Some("/nonexistent/initrd"));
    assert!(error.contains("/nonexistent/initrd"), "{error}");

    let longest = "x".repeat(CMDLINE_BYTES_MAX - 1 - 35);
    load_bytes(&ram(), &tiny_elf(CODE), &longest, 0).unwrap();
    let too_long = load_bytes(&ram(), &tiny_elf(CODE), &(longest + "x"), 0).unwrap_err();
    assert!(matches!(too_long, BootError::Cmdline { bytes: 2048, .. }), "{too_long}");
    let zero = load_bytes(&ram(), &tiny_elf(CODE), "a\0b", 0).unwrap_err();
    assert!(matches!(zero, BootError::Cmdline { .. }), "{zero}");
}
