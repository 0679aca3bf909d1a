//! Finding out what kind of kernel an image is, and having it loaded by whoever knows that kind.
//!
//! | image | entered by |
//! |---|---|
//! | ELF with a PVH note | PVH: 32-bit, the start info in EBX |
//! | ELF without one, such as a vmlinux | Linux's 64-bit boot protocol at its entry |
//! | bzImage | Linux's 64-bit boot protocol, 0x200 behind its start |
//!
//! What is neither is refused by name. Kernels for 32-bit processors and EFI programs are not booted.

use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ReadVolatile;

use super::{BootError, bzimage, elf};
use crate::config::Kernel;
use crate::memory::GuestRam;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LoadedKernel {
    /// Its first instruction.
    pub(super) entry: u64,
    /// The first address behind everything that it needs before it has read the memory map.
    pub(super) end: u64,
    pub(super) protocol: Protocol,
}

/// By what rules a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Protocol {
    /// PVH.
    Pvh,
    /// Linux's 64-bit boot protocol, with the image's own setup header, or one made up for an ELF image.
    Linux64(setup_header),
}

/// An image being looked at: its name for messages, its bytes and how many they are.
#[derive(Debug)]
pub(super) struct Image<'a, F> {
    pub(super) name: &'a str,
    pub(super) file: &'a mut F,
    pub(super) bytes: u64,
}

impl<F: Read + Seek> Image<'_, F> {
    pub(super) fn not_bootable(&self, what: impl Into<String>) -> BootError {
        BootError::NotBootable { kernel: self.name.to_owned(), what: what.into() }
    }

    pub(super) fn read_error(&self, source: io::Error) -> BootError {
        BootError::ReadKernel { kernel: self.name.to_owned(), source }
    }

    pub(super) fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), BootError> {
        let read = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(into));
        read.map_err(|source| self.read_error(source))
    }
}

/// Opens a regular file for reading. Not blocking, so that a pipe without a writer is refused and not waited for.
pub(super) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    Ok((file, metadata.len()))
}

/// Loads a kernel, or says why not.
pub(super) fn load(ram: &GuestRam, kernel: &Kernel) -> Result<LoadedKernel, BootError> {
    match kernel {
        Kernel::File(path) => {
            let name = path.display().to_string();
            let opened = open_regular(path);
            let (mut file, _) =
                opened.map_err(|source| BootError::ReadKernel { kernel: name.clone(), source })?;
            load_image(ram, &name, &mut file)
        }
        Kernel::Image { name, bytes } => load_image(ram, name, &mut Cursor::new(*bytes)),
    }
}

fn load_image<F>(ram: &GuestRam, name: &str, file: &mut F) -> Result<LoadedKernel, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(|source| BootError::ReadKernel { kernel: name.to_owned(), source })?;
    let mut image = Image { name, file, bytes };
    if elf::is_elf(&mut image)? {
        return elf::load(ram, &mut image);
    }
    if bzimage::is_bzimage(&mut image)? {
        return bzimage::load(ram, &mut image);
    }
    Err(image.not_bootable(format!(
        "its {bytes} bytes are neither an ELF image (vmlinux) nor a Linux bzImage; give one of them"
    )))
}
