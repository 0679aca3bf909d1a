//! Loading an ELF kernel with a PVH note.
//!
//! The image is looked through before anything is written, so that every refusal can name its cause;
//! linux-loader then does the loading. The PVH note is looked for here, in every note segment, because
//! linux-loader lets the last segment decide. Compressed kernels (bzImage) are not read here.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};

use linux_loader::elf as headers;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::Elf;
use vm_memory::{ByteValued, ReadVolatile};

use super::{BootError, HIGH_MEMORY};
use crate::config::Kernel;
use crate::memory::GuestRam;

/// Program headers that are looked at; kernels have about five.
const SEGMENTS_MAX: u16 = 128;

/// Bytes of a note segment that are looked through; a kernel's notes are a few hundred.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// XEN_ELFNOTE_PHYS32_ENTRY, by which an image names its PVH entry.
const NOTE_PVH_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_ALIGNMENT: usize = 4;

const ELF_CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadedKernel {
    /// Where its PVH entry is.
    pub(super) entry: u64,
    /// The first address behind it.
    pub(super) end: u64,
}

/// Loads a kernel, or says why not.
pub(super) fn load(ram: &GuestRam, kernel: &Kernel) -> Result<LoadedKernel, BootError> {
    match kernel {
        Kernel::File(path) => {
            let name = path.display().to_string();
            let read_error = |source| BootError::ReadKernel { kernel: name.clone(), source };
            let mut file = File::open(path).map_err(read_error)?;
            if !file.metadata().map_err(read_error)?.is_file() {
                return Err(read_error(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file")));
            }
            load_image(ram, &name, &mut file)
        }
        Kernel::Image { name, bytes } => load_image(ram, name, &mut Cursor::new(*bytes)),
    }
}

fn load_image<F>(ram: &GuestRam, name: &str, image: &mut F) -> Result<LoadedKernel, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    let (end, entry) = inspect(ram, name, image)?;
    let not_bootable = |what: String| BootError::NotBootable { kernel: name.to_owned(), what };
    let entry = entry.ok_or_else(|| {
        not_bootable(
            "it has no PVH entry (an ELF note of type 18 by \"Xen\"); build Linux \
             with CONFIG_PVH=y and give its vmlinux"
                .into(),
        )
    })?;
    if !(HIGH_MEMORY..end).contains(&entry) {
        return Err(not_bootable(format!("its PVH entry {entry:#x} is outside its segments")));
    }
    Elf::load(ram.tracked(), None, image, None).map_err(|error| not_bootable(error.to_string()))?;
    Ok(LoadedKernel { entry, end })
}

/// Checks an image against its length and the guest's memory; returns where it ends in memory and its PVH
/// entry, if it names one.
fn inspect<F: Read + Seek>(
    ram: &GuestRam,
    name: &str,
    image: &mut F,
) -> Result<(u64, Option<u64>), BootError> {
    let not_bootable = |what: String| BootError::NotBootable { kernel: name.to_owned(), what };
    let read_error = |source: io::Error| BootError::ReadKernel { kernel: name.to_owned(), source };
    let file_bytes = image.seek(SeekFrom::End(0)).map_err(read_error)?;
    image.rewind().map_err(read_error)?;
    let mut header = headers::Elf64_Ehdr::default();
    if file_bytes < size_of::<headers::Elf64_Ehdr>() as u64 {
        return Err(not_bootable(format!("its {file_bytes} bytes are too few for an ELF image")));
    }
    image.read_exact(header.as_mut_slice()).map_err(read_error)?;
    if header.e_ident[..4] != *b"\x7fELF" {
        return Err(not_bootable(
            "it is not an ELF image (give an uncompressed vmlinux, not a bzImage)".into(),
        ));
    }
    if header.e_ident[4] != ELF_CLASS_64 || header.e_machine != MACHINE_X86_64 {
        return Err(not_bootable("it is not an ELF image for 64-bit x86".into()));
    }
    if header.e_phnum == 0 || header.e_phnum > SEGMENTS_MAX {
        return Err(not_bootable(format!("it has {} program headers", header.e_phnum)));
    }
    image.seek(SeekFrom::Start(header.e_phoff)).map_err(read_error)?;
    let mut end = 0;
    let mut notes = Vec::new();
    for _ in 0..header.e_phnum {
        let mut segment = headers::Elf64_Phdr::default();
        image
            .read_exact(segment.as_mut_slice())
            .map_err(|_| not_bootable("it is truncated: its program headers are cut off".into()))?;
        end = end.max(check_segment(ram, name, file_bytes, &segment)?);
        if segment.p_type == headers::PT_NOTE {
            notes.push(segment);
        }
    }
    if end == 0 {
        return Err(not_bootable("it has nothing to load".into()));
    }
    for note in notes {
        let bytes = usize::try_from(note.p_filesz.min(NOTE_BYTES_MAX)).expect("NOTE_BYTES_MAX fits");
        let mut bytes = vec![0; bytes];
        image.seek(SeekFrom::Start(note.p_offset)).map_err(read_error)?;
        image.read_exact(&mut bytes).map_err(read_error)?;
        if let Some(entry) = pvh_entry(&bytes) {
            return Ok((end, Some(entry)));
        }
    }
    Ok((end, None))
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
fn check_segment(
    ram: &GuestRam,
    name: &str,
    file_bytes: u64,
    segment: &headers::Elf64_Phdr,
) -> Result<u64, BootError> {
    let not_bootable = |what: String| BootError::NotBootable { kernel: name.to_owned(), what };
    if !matches!(segment.p_type, headers::PT_LOAD | headers::PT_NOTE) {
        return Ok(0);
    }
    match segment.p_offset.checked_add(segment.p_filesz) {
        Some(needed) if needed <= file_bytes => {}
        Some(needed) => {
            let what = format!("it is truncated: its segments need {needed} bytes, and it has {file_bytes}");
            return Err(not_bootable(what));
        }
        None => return Err(not_bootable("a segment's place in the file is impossible".into())),
    }
    if segment.p_type != headers::PT_LOAD || segment.p_memsz == 0 {
        return Ok(0);
    }
    if segment.p_filesz > segment.p_memsz {
        return Err(not_bootable("a segment is longer in the file than in memory".into()));
    }
    if segment.p_paddr < HIGH_MEMORY {
        let what = format!("it wants to be loaded at {:#x}, below 1 MiB, where tables go", segment.p_paddr);
        return Err(not_bootable(what));
    }
    let available = ram.regions()[0].bytes;
    let needed = segment.p_paddr.saturating_add(segment.p_memsz);
    if needed > available {
        return Err(BootError::KernelTooBig { kernel: name.to_owned(), needed, available });
    }
    Ok(needed)
}
