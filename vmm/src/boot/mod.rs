//! Loading a kernel: an ELF image with a PVH entry note, its command line, its initial RAM disk, and
//! the tables that tell it about memory and processors.
//!
//! ```text
//! 0x0500     segment table          0x9fc00   MP table (behind usable memory's first part)
//! 0x6000     PVH start info         0x100000  kernel, where its ELF image says
//! 0x6040     module list            ...
//! 0x7000     memory map             end       initial RAM disk, at the end of the first region
//! 0x20000    command line
//! ```
//!
//! bzImage and ACPI are not here yet; they belong beside [`elf`] and [`mp_table`].

mod elf;
mod mp_table;
mod pvh;
mod registers;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

pub(crate) use registers::set_boot_registers;

use crate::capability::KvmCallError;
use crate::config::BootSource;
use crate::memory::{GuestRam, PAGE_BYTES};

/// The longest command line, with its terminating zero: what Linux takes on x86.
pub const CMDLINE_BYTES_MAX: usize = 2048;

const CMDLINE_ADDRESS: u64 = 0x2_0000;

/// Memory from here to 1 MiB is the firmware's on a PC, and reserved.
const BASE_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

/// Why a machine can't boot what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The machine runs, or was loaded or restored before.
    #[error("can't load a kernel: the machine is {status}; load one into a machine that was just built")]
    WrongStatus {
        /// What it is.
        status: &'static str,
    },
    /// The kernel can't be opened or read.
    #[error("can't read the kernel {kernel}")]
    ReadKernel {
        /// Its file.
        kernel: String,
        /// What the kernel of the host said.
        #[source]
        source: io::Error,
    },
    /// The kernel is no bootable image.
    #[error("can't boot {kernel}: {what}")]
    NotBootable {
        /// Its file, or name.
        kernel: String,
        /// Why not.
        what: String,
    },
    /// The kernel needs more memory than the machine has.
    #[error(
        "can't boot {kernel}: it needs memory up to {needed} bytes, and the machine has {available}; give \
         the machine more"
    )]
    KernelTooBig {
        /// Its file, or name.
        kernel: String,
        /// Where its last byte lies.
        needed: u64,
        /// Bytes of the machine's first memory region.
        available: u64,
    },
    /// The initial RAM disk can't be read.
    #[error("can't read the initial RAM disk {}", .path.display())]
    ReadInitrd {
        /// Its file.
        path: PathBuf,
        /// What the kernel of the host said.
        #[source]
        source: io::Error,
    },
    /// The initial RAM disk does not fit beside the kernel.
    #[error(
        "the initial RAM disk {} of {bytes} bytes does not fit into the {available} bytes of memory behind \
         the kernel; give the machine more",
        .path.display()
    )]
    InitrdTooBig {
        /// Its file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// What is left.
        available: u64,
    },
    /// The command line is too long or holds a zero byte.
    #[error("a command line of {bytes} bytes (with the machine's devices) can't be: {what}")]
    Cmdline {
        /// Its length with everything appended.
        bytes: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Guest memory could not be written.
    #[error("can't write {what} into guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmCallError),
}

/// Where a loaded kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The first instruction.
    pub(crate) address: u64,
    /// PVH's start info, which the kernel gets in EBX.
    pub(crate) start_info: u64,
}

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Module {
    address: u64,
    bytes: u64,
}

/// Writes everything that a kernel needs to start into guest memory. `devices` are appended to the
/// command line.
pub(crate) fn load(
    ram: &GuestRam,
    cpus: u8,
    boot: &BootSource,
    devices: &[String],
) -> Result<Entry, BootError> {
    let cmdline = complete_cmdline(&boot.cmdline, devices)?;
    let kernel = elf::load(ram, &boot.kernel)?;
    let initrd = boot.initrd.as_deref().map(|path| load_initrd(ram, path, kernel.end)).transpose()?;
    write(ram, &cmdline, CMDLINE_ADDRESS, "the command line")?;
    mp_table::write(ram, cpus, BASE_MEMORY_END)?;
    let start_info = pvh::write_start_info(ram, initrd)?;
    registers::write_segment_table(ram)?;
    Ok(Entry { address: kernel.entry, start_info })
}

fn write(ram: &GuestRam, bytes: &[u8], address: u64, what: &'static str) -> Result<(), BootError> {
    let written = ram.tracked().write_slice(bytes, GuestAddress(address));
    written.map_err(|source| BootError::Write { what, source })
}

/// The command line with its devices and terminating zero.
fn complete_cmdline(given: &str, devices: &[String]) -> Result<Vec<u8>, BootError> {
    let mut words: Vec<&str> = Vec::new();
    if !given.is_empty() {
        words.push(given);
    }
    words.extend(devices.iter().map(String::as_str));
    let mut bytes = words.join(" ").into_bytes();
    let length = bytes.len();
    if bytes.contains(&0) {
        return Err(BootError::Cmdline { bytes: length, what: "it holds a zero byte, which ends it" });
    }
    if length >= CMDLINE_BYTES_MAX {
        return Err(BootError::Cmdline { bytes: length, what: "it must be shorter than 2048 bytes" });
    }
    bytes.push(0);
    Ok(bytes)
}

/// Puts the initial RAM disk at the end of the first memory region.
fn load_initrd(ram: &GuestRam, path: &Path, kernel_end: u64) -> Result<Module, BootError> {
    let read_error = |source| BootError::ReadInitrd { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let bytes = file.metadata().map_err(read_error)?.len();
    if bytes == 0 {
        return Err(read_error(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty")));
    }
    let memory_end = ram.regions()[0].bytes;
    let page_bytes = PAGE_BYTES as u64;
    let first_free = kernel_end.max(HIGH_MEMORY).next_multiple_of(page_bytes);
    let too_big = || BootError::InitrdTooBig {
        path: path.to_owned(),
        bytes,
        available: memory_end.saturating_sub(first_free),
    };
    let address = memory_end.checked_sub(bytes).ok_or_else(too_big)? / page_bytes * page_bytes;
    if address < first_free {
        return Err(too_big());
    }
    let length = usize::try_from(bytes).map_err(|_| too_big())?;
    ram.tracked()
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|error| read_error(io::Error::other(error)))?;
    Ok(Module { address, bytes })
}

#[cfg(test)]
mod tests;
