//! What the guest shall do, as words: `MODE key=value ...`.
//!
//! ```text
//! idle
//! dirty [rate=MiB/s|max] [set=MiB] [order=linear|random] [write=word|page] [fill=MiB ...]
//! fill  mib=MiB [zero=%] [text=%] [random=%] [verify=MiB/s]
//! http  ip=ADDR/LEN [gw=ADDR] [ip6=ADDR/LEN] [port=N] [fill=MiB ...]
//! ```
//!
//! `dirty` and `http` take `fill=MiB` with the keys of `fill` and fill that much memory before they
//! start. Parsing is strict, so that a typing error is found by the host before it boots anything:
//! unknown words, words given twice, and values out of range are refused by name.
//! Whether the machine has enough memory for the job is not known here; the guest checks it.

mod error;
mod parse;

pub use error::{Word, WorkloadError};

use core::fmt::{self, Write as _};
use core::net::{Ipv4Addr, Ipv6Addr};

/// Largest amount of memory that a workload may ask for, in MiB (1 TiB).
pub const MEMORY_MIB_MAX: u32 = 1 << 20;

/// Largest rate that a workload may ask for, in MiB/s (1 TiB/s).
pub const RATE_MIB_S_MAX: u32 = 1 << 20;

/// Background verification of filled pages unless `verify=` says otherwise, in MiB/s.
pub const VERIFY_MIB_S_DEFAULT: u32 = 32;

/// The job of a workload guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Keep the heartbeat and halt.
    Idle,
    /// Write pages at a steady rate.
    Dirty(Dirty),
    /// Fill memory once, then verify it slowly for ever.
    Fill(Fill),
    /// Serve a file over HTTP.
    Http(Http),
}

/// The job of writing pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirty {
    /// How fast pages are written.
    pub rate: Rate,
    /// Working set, MiB.
    pub set_mib: u32,
    /// In which order a pass visits the set.
    pub order: Order,
    /// How much of each page is written.
    pub write: Write,
    /// What is filled before.
    pub fill: Fill,
}

/// A rate of pages written, counting every written page as 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// That many MiB a second.
    MibPerSecond(u32),
    /// As fast as it goes.
    Max,
}

/// The order in which a pass visits the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By increasing address.
    Linear,
    /// Each pass in another permutation.
    Random,
}

/// How much of a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// One 64-bit word.
    Word,
    /// All of it, with incompressible content.
    Page,
}

/// Memory that is filled once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// How much, MiB.
    pub mib: u32,
    /// Of what.
    pub shares: Shares,
    /// How fast it is verified in the background, MiB/s; 0 for not at all.
    pub verify_mib_s: u32,
}

impl Default for Fill {
    fn default() -> Self {
        Self { mib: 0, shares: Shares::RANDOM, verify_mib_s: VERIFY_MIB_S_DEFAULT }
    }
}

/// Shares of kinds of pages, percent; they add up to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    zero: u8,
    text: u8,
}

impl Shares {
    /// Nothing but random pages.
    pub const RANDOM: Self = Self { zero: 0, text: 0 };

    /// Shares in percent, if they add up to 100.
    #[must_use]
    pub const fn new(zero: u8, text: u8, random: u8) -> Option<Self> {
        if zero as u32 + text as u32 + random as u32 == 100 { Some(Self { zero, text }) } else { None }
    }

    /// Percent of zero pages.
    #[must_use]
    pub const fn zero_percent(self) -> u8 {
        self.zero
    }

    /// Percent of text-like pages.
    #[must_use]
    pub const fn text_percent(self) -> u8 {
        self.text
    }

    /// Percent of random pages.
    #[must_use]
    pub const fn random_percent(self) -> u8 {
        100 - self.zero - self.text
    }
}

/// The job of serving a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http {
    /// IPv4 address and prefix length.
    pub ip: (Ipv4Addr, u8),
    /// IPv4 default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// IPv6 address and prefix length, beside the link-local one that the guest always has.
    pub ip6: Option<(Ipv6Addr, u8)>,
    /// TCP port.
    pub port: u16,
    /// What is filled before.
    pub fill: Fill,
}

/// Memory that the guest takes for itself, beside what its job asks for, in MiB: image, page tables, network buffers.
pub const OVERHEAD_MIB: u32 = 16;

impl Workload {
    /// The least memory that a machine needs for this job, in MiB.
    #[must_use]
    pub const fn memory_mib_min(&self) -> u32 {
        let job = match self {
            Self::Idle => 0,
            Self::Dirty(dirty) => dirty.set_mib + dirty.fill.mib,
            Self::Fill(fill) => fill.mib,
            Self::Http(http) => http.fill.mib,
        };
        job + OVERHEAD_MIB
    }

    /// The memory to fill before the main job starts.
    #[must_use]
    pub fn fill(&self) -> Fill {
        match self {
            Self::Idle => Fill::default(),
            Self::Dirty(dirty) => dirty.fill,
            Self::Fill(fill) => *fill,
            Self::Http(http) => http.fill,
        }
    }
}

/// The canonical words: every key, defaults too, in a fixed order.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => f.write_str("idle"),
            Self::Dirty(Dirty { rate, set_mib, order, write, fill }) => {
                f.write_str("dirty rate=")?;
                match rate {
                    Rate::MibPerSecond(rate) => write!(f, "{rate}")?,
                    Rate::Max => f.write_str("max")?,
                }
                let order = match order {
                    Order::Linear => "linear",
                    Order::Random => "random",
                };
                let write = match write {
                    Write::Word => "word",
                    Write::Page => "page",
                };
                write!(f, " set={set_mib} order={order} write={write} fill={}", fill.mib)?;
                show_content(fill, f)
            }
            Self::Fill(fill) => {
                write!(f, "fill mib={}", fill.mib)?;
                show_content(fill, f)
            }
            Self::Http(Http { ip, gateway, ip6, port, fill }) => {
                write!(f, "http ip={}/{}", ip.0, ip.1)?;
                if let Some(gateway) = gateway {
                    write!(f, " gw={gateway}")?;
                }
                if let Some((address, prefix)) = ip6 {
                    write!(f, " ip6={address}/{prefix}")?;
                }
                write!(f, " port={port} fill={}", fill.mib)?;
                show_content(fill, f)
            }
        }
    }
}

fn show_content(fill: &Fill, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Fill { mib: _, shares, verify_mib_s } = fill;
    let (zero, text, random) = (shares.zero_percent(), shares.text_percent(), shares.random_percent());
    f.write_char(' ')?;
    write!(f, "zero={zero} text={text} random={random} verify={verify_mib_s}")
}
