//! What the harness and its ferry workers say to each other: one JSON object a line.

use std::path::PathBuf;

use ferry_migrate::protocol::page;
use ferry_migrate::report::MigrationReport;
use ferry_vmm::{Backing, HugePages, MemoryConfig};
use serde::{Deserialize, Serialize};

use crate::scenario::{Compression, MemoryBacking};

/// What `compression` is to ferry.
///
/// # Errors
/// What ferry lacks, in words.
pub fn packing(compression: Compression) -> Result<page::Compression, &'static str> {
    match compression {
        Compression::None => Ok(page::Compression::None),
        Compression::Lz4 => Ok(page::Compression::Lz4),
        Compression::Auto => Ok(page::Compression::Auto),
        Compression::Zstd => Ok(page::Compression::Zstd(1)),
        Compression::Xbzrle => {
            Err("its differences are of another kind; it sends them with every packing but none")
        }
    }
}

/// Memory of `size_bytes` that is held so.
#[must_use]
pub fn memory(size_bytes: u64, backing: MemoryBacking) -> MemoryConfig {
    match backing {
        MemoryBacking::Private => MemoryConfig::new(size_bytes, Backing::PrivateAnonymous),
        MemoryBacking::Shared => MemoryConfig::new(size_bytes, Backing::SharedMemfd),
        MemoryBacking::Hugepages => {
            let mut memory = MemoryConfig::new(size_bytes, Backing::PrivateAnonymous);
            memory.huge_pages = HugePages::Pool;
            memory
        }
    }
}

/// What a source is to boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceOrder {
    /// The ELF kernel.
    pub kernel: PathBuf,
    /// Its RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// Its memory.
    pub memory_mib: u32,
    /// What holds it.
    pub backing: MemoryBacking,
    /// Its vCPUs.
    pub cpus: u8,
    /// Its tap and MAC.
    pub net: Option<(String, [u8; 6])>,
    /// Where its serial output goes.
    pub serial: PathBuf,
    /// Where its record is kept.
    pub folder: PathBuf,
}

/// What a target is to wait for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetOrder {
    /// Where to listen, as `IP:PORT`, where port 0 takes a free one, or as `unix:/PATH`.
    pub listen: String,
    /// The tap for the guest that comes.
    pub tap: Option<String>,
    /// Where its record is kept.
    pub folder: PathBuf,
}

/// The order to migrate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveOrder {
    /// `host:port` of the target, or `unix:/PATH` to hand memory over.
    pub target: String,
    /// Data streams; as many as pay without a number.
    pub streams: Option<u16>,
    /// How pages are packed.
    pub compression: Compression,
    /// Whether both sides take digests of memory.
    pub verify: bool,
    /// The most that is sent while the guest runs.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The downtime that is allowed.
    pub downtime_ms: f64,
    /// How long it may take until the guest is stopped.
    pub timeout_ms: f64,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "kebab-case")]
pub enum Said {
    /// The source's guest runs.
    Up,
    /// The target listens.
    Listening {
        /// Where, as a source takes it.
        address: String,
    },
    /// A round begins.
    RoundStarted {
        /// Counted from 1.
        round: u32,
        /// Its pages.
        pages: u64,
    },
    /// The guest is being stopped, and the last round begins.
    Stopping {
        /// Its pages.
        pages: u64,
    },
    /// A round has arrived at the target.
    RoundDone {
        /// The round in numbers.
        round: Box<ferry_migrate::report::Round>,
    },
    /// How far the round is.
    Sent {
        /// Pages of it that are sent.
        round_pages: u64,
    },
    /// The target runs the guest.
    Handed,
    /// The source has let go of everything.
    Moved {
        /// The migration in numbers.
        report: Box<MigrationReport>,
    },
    /// The guest goes on at the source.
    Stayed {
        /// Whether that is for want of time.
        timeout: bool,
        /// Why.
        reason: String,
    },
}
