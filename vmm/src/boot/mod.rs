//! Loading a kernel: its image, its command line, its initial RAM disk, and the tables that tell it about memory,
//! processors and devices.
//!
//! ```text
//! 0x0500     segment table             0x9fc00   MP table (behind usable memory's first part)
//! 0x6000     PVH start info            0xe0000   ACPI tables
//! 0x6040     module list               0x100000  kernel, where its image says
//! 0x7000     PVH's memory map, or      ...
//!            Linux's boot parameters   end       initial RAM disk, at the end of the first region, or as far
//! 0xa000     Linux's page tables                 up as Linux takes it
//! 0x20000    command line
//! ```
//!
//! [`image`] tells the kinds of kernel apart. Nothing here runs, and nothing of it is there after the load but bytes in
//! guest memory and the first vCPU's registers.

mod acpi;
mod bzimage;
mod elf;
mod image;
mod linux;
mod memory_map;
mod mp_table;
mod pvh;
mod registers;

use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

pub(crate) use registers::set_boot_registers;

use crate::capability::KvmCallError;
use crate::config::BootSource;
use crate::memory::{GuestRam, PAGE_BYTES};
use image::Protocol;

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
        "the initial RAM disk {} of {bytes} bytes does not fit into the {available} bytes behind the kernel where it \
         can lie; give the machine more memory",
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
        what: String,
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

/// Where and how a loaded kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The first instruction.
    pub(crate) address: u64,
    /// What tells it about the machine: PVH's start info, which it gets in EBX, or Linux's boot parameters, in RSI.
    pub(crate) information: u64,
    pub(crate) mode: Mode,
}

/// What the first vCPU is like when a kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 32-bit protected mode without paging.
    Pvh,
    /// 64-bit mode, the first 4 GiB mapped to themselves.
    Linux64,
}

/// A virtio-mmio window and its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VirtioWindow {
    pub(crate) address: u64,
    pub(crate) interrupt: u32,
}

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Module {
    address: u64,
    bytes: u64,
}

/// Writes everything that a kernel needs to start into guest memory.
pub(crate) fn load(
    ram: &GuestRam,
    cpus: u8,
    boot: &BootSource,
    virtio: &[VirtioWindow],
) -> Result<Entry, BootError> {
    let parameters = if boot.acpi { Vec::new() } else { device_parameters(virtio) };
    let cmdline = complete_cmdline(&boot.cmdline, &parameters)?;
    let kernel = image::load(ram, &boot.kernel)?;
    let initrd_end = match kernel.protocol {
        Protocol::Pvh => u64::MAX,
        Protocol::Linux64(header) => {
            check_cmdline_for(&cmdline, header.cmdline_size)?;
            u64::from(header.initrd_addr_max) + 1
        }
    };
    let initrd = boot.initrd.as_deref();
    let initrd = initrd.map(|path| load_initrd(ram, path, kernel.end, initrd_end)).transpose()?;
    write(ram, &cmdline, CMDLINE_ADDRESS, "the command line")?;
    mp_table::write(ram, cpus, BASE_MEMORY_END)?;
    let acpi_root = if boot.acpi { Some(acpi::write(ram, cpus, virtio)?) } else { None };
    let (information, mode) = match kernel.protocol {
        Protocol::Pvh => (pvh::write_start_info(ram, initrd, acpi_root)?, Mode::Pvh),
        Protocol::Linux64(header) => {
            (linux::write_boot_params(ram, header, initrd, acpi_root)?, Mode::Linux64)
        }
    };
    registers::write_segment_table(ram, mode)?;
    Ok(Entry { address: kernel.entry, information, mode })
}

/// Kernel parameters by which Linux finds virtio-mmio windows without ACPI.
fn device_parameters(virtio: &[VirtioWindow]) -> Vec<String> {
    let parameter = |VirtioWindow { address, interrupt }: &VirtioWindow| {
        format!("virtio_mmio.device=4K@{address:#x}:{interrupt}")
    };
    virtio.iter().map(parameter).collect()
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
        return Err(BootError::Cmdline { bytes: length, what: "it holds a zero byte, which ends it".into() });
    }
    if length >= CMDLINE_BYTES_MAX {
        let what = format!("it must be shorter than {CMDLINE_BYTES_MAX} bytes");
        return Err(BootError::Cmdline { bytes: length, what });
    }
    bytes.push(0);
    Ok(bytes)
}

/// Refuses a command line, with its terminating zero, that is longer than the kernel says it takes (without).
fn check_cmdline_for(cmdline: &[u8], bytes_max: u32) -> Result<(), BootError> {
    let bytes = cmdline.len() - 1;
    if bytes > bytes_max as usize {
        let what = format!("this kernel takes {bytes_max} bytes at most");
        return Err(BootError::Cmdline { bytes, what });
    }
    Ok(())
}

/// Puts the initial RAM disk at the end of the first memory region, or below `end_max` if that comes first.
fn load_initrd(ram: &GuestRam, path: &Path, kernel_end: u64, end_max: u64) -> Result<Module, BootError> {
    let read_error = |source| BootError::ReadInitrd { path: path.to_owned(), source };
    let (mut file, bytes) = image::open_regular(path).map_err(read_error)?;
    if bytes == 0 {
        return Err(read_error(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty")));
    }
    let end = ram.regions()[0].bytes.min(end_max);
    let page_bytes = PAGE_BYTES as u64;
    let first_free = kernel_end.max(HIGH_MEMORY).next_multiple_of(page_bytes);
    let too_big = || BootError::InitrdTooBig {
        path: path.to_owned(),
        bytes,
        available: end.saturating_sub(first_free),
    };
    let address = end.checked_sub(bytes).ok_or_else(too_big)? / page_bytes * page_bytes;
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
