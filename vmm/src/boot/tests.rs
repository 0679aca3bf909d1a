//! What can be loaded, and what can't and why.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::config::{Backing, Kernel, MemoryConfig};
use crate::memory::{self, PAGE_BYTES};
use crate::tiny_kernel::{CODE_ADDRESS, elf as tiny_elf};
use crate::tiny_linux::{INIT_BYTES, at, bzimage, elf_without_note};

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
        acpi: false,
    };
    load(ram, 2, &boot, &[VirtioWindow { address: 0xd000_0000, interrupt: 5 }])
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
    assert_eq!(read::<4>(&ram, entry.information), 0x336e_c578_u32.to_le_bytes());

    let cmdline = read_u64(&ram, entry.information + 24);
    let expected = b"console=ttyS0 virtio_mmio.device=4K@0xd0000000:5\0";
    assert_eq!(&read::<49>(&ram, cmdline), expected);

    let modules = read_u64(&ram, entry.information + 16);
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
fn linux_finds_everything_in_its_boot_parameters() {
    for (image, entry_at) in [(bzimage(CODE), CODE_ADDRESS + 0x200), (elf_without_note(CODE), CODE_ADDRESS)] {
        let ram = ram();
        let entry = load_bytes(&ram, &image, "console=ttyS0", 5000).unwrap();
        assert_eq!((entry.address, entry.mode), (u64::from(entry_at), Mode::Linux64));
        assert_eq!(&read::<3>(&ram, entry.address), CODE);
        let at = |offset: usize| entry.information + offset as u64;
        let word = |offset: usize| u64::from(u32::from_le_bytes(read(&ram, at(offset))));
        assert_eq!(&read::<4>(&ram, at(at::MAGIC)), b"HdrS");
        assert_eq!(read::<1>(&ram, at(0x210)), [0xff], "an unnumbered loader");
        let expected = b"console=ttyS0 virtio_mmio.device=4K@0xd0000000:5\0";
        assert_eq!(&read::<49>(&ram, word(0x228)), expected);
        let (initrd, bytes) = (word(0x218), word(0x21c));
        assert_eq!((bytes, initrd % 4096), (5000, 0));
        assert_eq!(read::<5000>(&ram, initrd), [0x77; 5000]);
        // E820: three ranges of 20 bytes.
        assert_eq!(read::<1>(&ram, at(0x1e8)), [3]);
        let range = |index: usize| {
            let start = at(0x2d0 + index * 20);
            let kind = u32::from_le_bytes(read(&ram, start + 16));
            (read_u64(&ram, start), read_u64(&ram, start + 8), kind)
        };
        assert_eq!(range(0), (0, BASE_MEMORY_END, 1));
        assert_eq!(range(1), (BASE_MEMORY_END, HIGH_MEMORY - BASE_MEMORY_END, 2));
        assert_eq!(range(2), (HIGH_MEMORY, MEMORY_BYTES - HIGH_MEMORY, 1));
    }
}

fn set<const BYTES: usize>(mut image: Vec<u8>, at: usize, bytes: [u8; BYTES]) -> Vec<u8> {
    image[at..at + BYTES].copy_from_slice(&bytes);
    image
}

#[test]
fn an_old_header_ends_where_it_says() {
    let ram = ram();
    // Version 2.12 ended before kernel_info_offset, at 0x268, where code follows.
    let image = set(bzimage(CODE), at::HEADER_LENGTH, [0x66]);
    let image = set(image, 0x268, [0xff; 4]);
    let entry = load_bytes(&ram, &set(image, at::VERSION, [0x0c, 2]), "", 0).unwrap();
    assert_eq!(read::<4>(&ram, entry.information + 0x268), [0; 4]);
    assert_eq!(read::<4>(&ram, entry.information + 0x260), INIT_BYTES.to_le_bytes());
}

#[test]
fn a_bzimage_that_cannot_be_entered_in_64_bits_is_refused_with_the_cause() {
    let whole = bzimage(CODE);
    for (image, cause) in [
        (set(whole.clone(), at::VERSION, [0x0b, 2]), "2.11 of the boot protocol"),
        (set(whole.clone(), at::XLOADFLAGS, [0, 0]), "no 64-bit entry"),
        (set(whole.clone(), at::LOADFLAGS, [0]), "zImage"),
        (set(whole.clone(), at::BOOT_FLAG, [0, 0]), "0x0000, not 0xaa55"),
        (set(whole.clone(), at::PREF_ADDRESS, 0x1000_u64.to_le_bytes()), "below 1 MiB"),
        (set(whole.clone(), at::SYSSIZE, u32::MAX.to_le_bytes()), "truncated"),
        (set(whole.clone(), at::SETUP_SECTORS, [0]), "truncated"),
        (set(whole.clone(), at::SYSSIZE, [0; 4]), "truncated"),
        (
            set(set(whole.clone(), at::SYSSIZE, [0, 0, 0, 0]), at::SYSSIZE, [1])[..at::CODE + 16].to_vec(),
            "64-bit entry",
        ),
        (set(whole.clone(), at::MAGIC, *b"HdrX"), "neither an ELF image (vmlinux) nor a Linux bzImage"),
        (whole[..0x250].to_vec(), "inside its setup header"),
        (whole[..whole.len() - 16].to_vec(), "truncated"),
    ] {
        let found = refusal(&image);
        assert!(found.contains(cause), "'{cause}' is not in: {found}");
    }
    // The last paragraph may be short.
    load_bytes(&ram(), &whole[..whole.len() - 15], "", 0).unwrap();
}

#[test]
fn a_bzimage_says_how_much_memory_command_line_and_initrd_it_takes() {
    let big = set(bzimage(CODE), at::INIT_SIZE, (64_u32 << 20).to_le_bytes());
    let error = load_bytes(&ram(), &big, "", 0).unwrap_err();
    assert!(matches!(error, BootError::KernelTooBig { needed: 0x410_0000, .. }), "{error}");
    let high = set(bzimage(CODE), at::PREF_ADDRESS, u64::MAX.to_le_bytes());
    assert!(matches!(load_bytes(&ram(), &high, "", 0), Err(BootError::KernelTooBig { .. })));
    let terse = set(bzimage(CODE), at::CMDLINE_SIZE, 60_u32.to_le_bytes());
    let fits = "x".repeat(60 - 35);
    load_bytes(&ram(), &terse, &fits, 0).unwrap();
    let error = load_bytes(&ram(), &terse, &(fits + "x"), 0).unwrap_err();
    assert!(matches!(error, BootError::Cmdline { bytes: 61, .. }), "{error}");
    assert!(error.to_string().contains("60 bytes at most"), "{error}");
    // Behind the kernel and below 2 MiB.
    let low = set(bzimage(CODE), at::INITRD_MAX, 0x1f_ffff_u32.to_le_bytes());
    let ram = ram();
    let entry = load_bytes(&ram, &low, "", 5000).unwrap();
    let initrd = u32::from_le_bytes(read(&ram, entry.information + 0x218));
    assert_eq!(initrd, 0x1f_e000);
    let room = usize::try_from(HIGH_MEMORY - u64::from(INIT_BYTES)).unwrap();
    load_bytes(&ram, &low, "", room).unwrap();
    let error = load_bytes(&ram, &low, "", room + 1).unwrap_err();
    assert!(
        matches!(error, BootError::InitrdTooBig { available, .. } if available == room as u64),
        "{error}"
    );
}

#[test]
fn what_is_not_bootable_is_refused_with_file_and_cause() {
    assert!(refusal(b"").contains("neither"));
    assert!(refusal(&[0x90; 4096]).contains("neither"));
    assert!(refusal(b"\x7fELF").contains("too few"));
    for (at, byte, cause) in [
        (18, 183, "machine 183"),
        (4, 1, "32-bit ELF"),
        (5, 2, "big-endian"),
        (16, 1, "object or core"),
        (56, 0, "0 program headers"),
    ] {
        let mut image = tiny_elf(CODE);
        image[at] = byte;
        let found = refusal(&image);
        assert!(found.contains(cause), "'{cause}' is not in: {found}");
    }
    let mut nowhere = elf_without_note(CODE);
    nowhere[24..32].copy_from_slice(&0xffff_ffff_8100_0000_u64.to_le_bytes());
    assert!(refusal(&nowhere).contains("no PVH entry"));
    let mut program = elf_without_note(CODE);
    program[SEGMENT_NOTE..SEGMENT_NOTE + 4].copy_from_slice(&3_u32.to_le_bytes());
    assert!(refusal(&program).contains("program for an operating system"));
    let mut data = elf_without_note(CODE);
    data[SEGMENT_LOAD + 4] = 6;
    assert!(refusal(&data).contains("inside its code"));
    let whole = tiny_elf(CODE);
    for length in [70, 120, whole.len() - 1] {
        assert!(refusal(&whole[..length]).contains("truncated"), "{length} bytes");
    }
    assert!(refusal(&patched(SEGMENT_LOAD + FIELD_OFFSET, u64::MAX)).contains("impossible"));
    assert!(refusal(&patched(32, u64::MAX)).contains("truncated"));
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
            acpi: false,
        };
        load(&ram(), 1, &boot, &[]).unwrap_err().to_string()
    };
    assert!(missing("/nonexistent/vmlinux", None).contains("/nonexistent/vmlinux"));
    assert!(missing("/tmp", None).contains("/tmp"));
    assert!(missing("/dev/zero", None).contains("/dev/zero"));
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, tiny_elf(CODE)).unwrap();
    let error = missing(kernel.to_str().unwrap(), Some("/nonexistent/initrd"));
    assert!(error.contains("/nonexistent/initrd"), "{error}");
    // Nobody writes to it: opening must not wait.
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(missing(pipe.to_str().unwrap(), None).contains("pipe"));
    assert!(missing(kernel.to_str().unwrap(), pipe.to_str()).contains("pipe"));

    let longest = "x".repeat(CMDLINE_BYTES_MAX - 1 - 35);
    load_bytes(&ram(), &tiny_elf(CODE), &longest, 0).unwrap();
    let too_long = load_bytes(&ram(), &tiny_elf(CODE), &(longest + "x"), 0).unwrap_err();
    assert!(matches!(too_long, BootError::Cmdline { bytes: 2048, .. }), "{too_long}");
    let zero = load_bytes(&ram(), &tiny_elf(CODE), "a\0b", 0).unwrap_err();
    assert!(matches!(zero, BootError::Cmdline { .. }), "{zero}");
}

/// Bytes of an image that are replaced, so that most of it stays plausible.
fn damage() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    let byte = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x7f), Just(0x80)];
    prop::collection::vec((any::<prop::sample::Index>(), byte), 0..8)
}

proptest! {
    /// No bytes make the loader panic; what it takes starts inside the machine's memory.
    #[test]
    fn any_image_is_loaded_or_refused(
        kind in 0..3_usize,
        damage in damage(),
        end in any::<prop::sample::Index>(),
        cut in any::<bool>(),
        noise in prop::collection::vec(any::<u8>(), 0..1200),
    ) {
        let mut image = match kind {
            0 => tiny_elf(CODE),
            1 => bzimage(CODE),
            _ => noise,
        };
        // Most of what matters lies in the headers.
        let headers = image.len().min(0x280);
        for (at, byte) in damage {
            if headers > 0 {
                image[at.index(headers)] = byte;
            }
        }
        if cut {
            image.truncate(end.index(image.len() + 1));
        }
        let ram = ram();
        if let Ok(entry) = load_bytes(&ram, &image, "", 100) {
            prop_assert!((HIGH_MEMORY..MEMORY_BYTES).contains(&entry.address), "{entry:x?}");
        }
    }
}
