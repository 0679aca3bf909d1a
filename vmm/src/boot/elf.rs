//! Loading an ELF kernel: by its PVH note if it has one, else by Linux's 64-bit boot protocol.
//!
//! The image is looked through before anything is written, so that every refusal can name its cause;
//! linux-loader then does the loading. The PVH note is looked for here, in every note segment, because
//! linux-loader lets the last segment decide.

use std::io::{Read, Seek};

use linux_loader::elf as headers;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{ByteValued, ReadVolatile};

use super::image::{Image, LoadedKernel, Protocol};
use super::{BootError, HIGH_MEMORY, linux};
use crate::memory::GuestRam;

/// Program headers that are looked at; kernels have about five.
const SEGMENTS_MAX: u16 = 128;

/// Bytes of a note segment that are looked through; a kernel's notes are a few hundred.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// XEN_ELFNOTE_PHYS32_ENTRY, by which an image names its PVH entry.
const NOTE_PVH_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_ALIGNMENT: usize = 4;

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;

/// The flag of a segment that holds code.
const SEGMENT_EXECUTABLE: u32 = 1;

/// Names the interpreter of a program; no kernel has one.
const SEGMENT_INTERPRETER: u32 = 3;

/// Whether an image begins as ELF images do.
pub(super) fn is_elf<F: Read + Seek>(image: &mut Image<'_, F>) -> Result<bool, BootError> {
    let mut magic = [0; MAGIC.len()];
    if image.bytes < magic.len() as u64 {
        return Ok(false);
    }
    image.read_at(0, &mut magic)?;
    Ok(magic == MAGIC)
}

/// Loads an ELF image.
pub(super) fn load<F>(ram: &GuestRam, image: &mut Image<'_, F>) -> Result<LoadedKernel, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    let header = read_header(image)?;
    let segments = read_segments(image, &header)?;
    let mut end = 0;
    for segment in &segments {
        end = end.max(check_segment(ram, image, segment)?);
    }
    if end == 0 {
        return Err(image.not_bootable("it has nothing to load"));
    }
    let (entry, protocol) = match find_pvh_entry(image, &segments)? {
        Some(entry) => {
            if !(HIGH_MEMORY..end).contains(&entry) {
                return Err(image.not_bootable(format!("its PVH entry {entry:#x} is outside its segments")));
            }
            (entry, Protocol::Pvh)
        }
        None => {
            check_linux_entry(image, &header, &segments)?;
            (header.e_entry, Protocol::Linux64(linux::header_of_elf()))
        }
    };
    let loaded = Elf::load(ram.tracked(), None, image.file, None);
    loaded.map_err(|error| image.not_bootable(error.to_string()))?;
    Ok(LoadedKernel { entry, end, protocol })
}

fn read_header<F: Read + Seek>(image: &mut Image<'_, F>) -> Result<headers::Elf64_Ehdr, BootError> {
    let mut header = headers::Elf64_Ehdr::default();
    if image.bytes < size_of::<headers::Elf64_Ehdr>() as u64 {
        return Err(image.not_bootable(format!("its {} bytes are too few for an ELF image", image.bytes)));
    }
    image.read_at(0, header.as_mut_slice())?;
    let (class, order) = (header.e_ident[4], header.e_ident[5]);
    if order != LITTLE_ENDIAN {
        return Err(image.not_bootable("it is a big-endian ELF image, not one for 64-bit x86"));
    }
    if class != CLASS_64 {
        return Err(image.not_bootable(
            "it is a 32-bit ELF image, not one for 64-bit x86; give a kernel built for x86-64",
        ));
    }
    if header.e_machine != MACHINE_X86_64 {
        let what = format!("it is an ELF image for machine {}, not for 64-bit x86", header.e_machine);
        return Err(image.not_bootable(what));
    }
    if !matches!(header.e_type, TYPE_EXECUTABLE | TYPE_SHARED) {
        return Err(image.not_bootable("it is an ELF object or core, and nothing that can be executed"));
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return Err(image.not_bootable(format!("it has {} program headers", header.e_phnum)));
    }
    Ok(header)
}

fn read_segments<F: Read + Seek>(
    image: &mut Image<'_, F>,
    header: &headers::Elf64_Ehdr,
) -> Result<Vec<headers::Elf64_Phdr>, BootError> {
    let count = usize::from(header.e_phnum);
    let bytes = count * size_of::<headers::Elf64_Phdr>();
    if header.e_phoff.checked_add(bytes as u64).is_none_or(|end| end > image.bytes) {
        return Err(image.not_bootable("it is truncated: its program headers are cut off"));
    }
    let mut segments = vec![headers::Elf64_Phdr::default(); count];
    for (at, segment) in (header.e_phoff..).step_by(size_of::<headers::Elf64_Phdr>()).zip(&mut segments) {
        image.read_at(at, segment.as_mut_slice())?;
    }
    Ok(segments)
}

/// The entry that the first PVH note names, if there is one.
fn find_pvh_entry<F: Read + Seek>(
    image: &mut Image<'_, F>,
    segments: &[headers::Elf64_Phdr],
) -> Result<Option<u64>, BootError> {
    for note in segments.iter().filter(|segment| segment.p_type == headers::PT_NOTE) {
        let bytes = usize::try_from(note.p_filesz.min(NOTE_BYTES_MAX)).expect("NOTE_BYTES_MAX fits");
        let mut bytes = vec![0; bytes];
        image.read_at(note.p_offset, &mut bytes)?;
        if let Some(entry) = pvh_entry(&bytes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Without a PVH note, the image's entry must be a physical address inside its code, as a vmlinux's is.
fn check_linux_entry<F: Read + Seek>(
    image: &Image<'_, F>,
    header: &headers::Elf64_Ehdr,
    segments: &[headers::Elf64_Phdr],
) -> Result<(), BootError> {
    let no_note = "it has no PVH entry (an ELF note of type 18 by \"Xen\")";
    if segments.iter().any(|segment| segment.p_type == SEGMENT_INTERPRETER) {
        return Err(image.not_bootable(format!("{no_note} and is a program for an operating system")));
    }
    let holds_entry = |segment: &&headers::Elf64_Phdr| {
        segment.p_type == headers::PT_LOAD
            && segment.p_flags & SEGMENT_EXECUTABLE != 0
            && header.e_entry.checked_sub(segment.p_paddr).is_some_and(|offset| offset < segment.p_filesz)
    };
    if segments.iter().find(holds_entry).is_none() {
        return Err(image.not_bootable(format!(
            "{no_note}, and its entry {:#x} is no physical address inside its code; build Linux with CONFIG_PVH=y \
             and give its vmlinux, or give its bzImage",
            header.e_entry
        )));
    }
    Ok(())
}

/// The PVH entry that a segment's notes name. A note is the lengths of its name and its description, its
/// type, then both, each padded to four bytes (ELF specification 1.2, section "Note Section").
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    loop {
        let (lengths, rest) = notes.split_first_chunk::<8>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let [name_bytes, description_bytes] = [0, 4].map(|at| {
            let word = [lengths[at], lengths[at + 1], lengths[at + 2], lengths[at + 3]];
            u32::from_le_bytes(word) as usize
        });
        let name = rest.get(..name_bytes)?;
        let rest = rest.get(name_bytes.next_multiple_of(NOTE_ALIGNMENT)..)?;
        let description = rest.get(..description_bytes)?;
        if u32::from_le_bytes(*kind) == NOTE_PVH_ENTRY && name == NOTE_NAME {
            return description.first_chunk::<4>().map(|entry| u32::from_le_bytes(*entry).into());
        }
        notes = rest.get(description_bytes.next_multiple_of(NOTE_ALIGNMENT)..)?;
    }
}

/// Where a segment ends in guest memory, or 0 if it isn't loaded.
fn check_segment<F: Read + Seek>(
    ram: &GuestRam,
    image: &Image<'_, F>,
    segment: &headers::Elf64_Phdr,
) -> Result<u64, BootError> {
    if !matches!(segment.p_type, headers::PT_LOAD | headers::PT_NOTE) {
        return Ok(0);
    }
    match segment.p_offset.checked_add(segment.p_filesz) {
        Some(needed) if needed <= image.bytes => {}
        Some(needed) => {
            let what =
                format!("it is truncated: its segments need {needed} bytes, and it has {}", image.bytes);
            return Err(image.not_bootable(what));
        }
        None => return Err(image.not_bootable("a segment's place in the file is impossible")),
    }
    if segment.p_type != headers::PT_LOAD || segment.p_memsz == 0 {
        return Ok(0);
    }
    if segment.p_filesz > segment.p_memsz {
        return Err(image.not_bootable("a segment is longer in the file than in memory"));
    }
    if segment.p_paddr < HIGH_MEMORY {
        let what = format!("it wants to be loaded at {:#x}, below 1 MiB, where tables go", segment.p_paddr);
        return Err(image.not_bootable(what));
    }
    let available = ram.regions()[0].bytes;
    let needed = segment.p_paddr.saturating_add(segment.p_memsz);
    if needed > available {
        return Err(BootError::KernelTooBig { kernel: image.name.to_owned(), needed, available });
    }
    Ok(needed)
}
