//! What the workload guest and its host agree on.
//!
//! The guest (`tools/guest/kernel`) and whoever runs it (the VMM, the tests, the demo) meet in four
//! places, and each is a module here so that both sides compile the same definition:
//!
//! - [`workload`]: the words that say what the guest shall do, checked on the host before booting;
//! - [`cmdline`]: where those words stand on the kernel command line;
//! - [`report`]: the page of guest memory in which the guest says how it fares;
//! - [`content`]: what the guest writes into its pages and serves over HTTP, so that a host can verify it.
//!
//! The crate uses neither std nor an allocator nor `unsafe`. It does not know how guest memory is
//! reached: callers hand in a copy of the report page.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod cmdline;
pub mod content;
pub mod http;
pub mod order;
pub mod quota;
pub mod report;
pub mod workload;

pub use cmdline::{CommandLine, VirtioMmioDevice};
pub use report::{Gap, Report, ReportError};
pub use workload::{Workload, WorkloadError};

/// Guest-physical address of the report page: the first page of the guest's ELF image.
pub const REPORT_GPA: u64 = 0x20_0000;

/// Size of a guest page and of the report, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// I/O port to which the guest writes [`SHUTDOWN_VALUE`] when it has nothing left to live for.
pub const SHUTDOWN_PORT: u16 = 0xf4;

/// The byte written to [`SHUTDOWN_PORT`].
pub const SHUTDOWN_VALUE: u8 = 0;

/// I/O port of the serial console (an ordinary 16550 as far as the guest's output is concerned).
pub const SERIAL_PORT: u16 = 0x3f8;

/// UDP port on which the `http` workload echoes every datagram.
pub const UDP_ECHO_PORT: u16 = 7;

/// Path under which the `http` workload serves [`content::http_file_byte`].
pub const HTTP_FILE_PATH: &str = "/file";

/// Length of the file served at [`HTTP_FILE_PATH`], in bytes.
pub const HTTP_FILE_LEN: usize = 512 * 1024;
