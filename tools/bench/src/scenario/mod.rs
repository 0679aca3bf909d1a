//! What is to be measured: suites, their scenarios, and the engines with their settings.
//!
//! These are the checked types. [`mod@file`] reads them from TOML, where adding a scenario is adding a table; the
//! suites that come along lie in `suites/`.

pub mod file;
mod limit;
mod setting;

use std::path::PathBuf;

use ferry_guest_abi::Workload;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use limit::{Base, Bound, Limit, Quantity, Rate};
pub use setting::{Auto, MemoryBacking, Streams};

/// A set of scenarios that are run and reported together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Suite {
    /// Its name, as given on the command line.
    pub name: String,
    /// One line for a heading.
    pub title: String,
    /// A sentence or two on what it is for.
    pub summary: String,
    /// The engines that its scenarios name.
    pub engines: Vec<EngineConfig>,
    /// The scenarios, in the order of the file, sweeps expanded.
    pub scenarios: Vec<Scenario>,
    /// What is expected of its figures.
    #[serde(default)]
    pub limits: Vec<Limit>,
}

/// One guest on one link, which every engine in turn migrates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Scenario {
    /// Unique within its suite; letters, digits and hyphens.
    pub name: String,
    /// One line for a heading.
    pub title: String,
    /// What runs in the VM.
    pub guest: Guest,
    /// The VM's memory, in MiB.
    pub memory_mib: u32,
    /// How much bare TCP carries, in MiB; as much as the guest has pages that are not zero if it is not given.
    #[serde(default)]
    pub tcp_mib: Option<u32>,
    /// Its vCPUs.
    pub cpus: u8,
    /// What lies between the two hosts.
    pub link: Link,
    /// Who uses the VM meanwhile.
    pub client: Client,
    /// The downtime that is allowed, in ms.
    pub downtime_ms: f64,
    /// The longest that a migration may take, in s; one that has not ended then is cancelled.
    pub timeout_s: f64,
    /// How long the guest is watched before the migration and after it, in ms.
    pub watch_ms: u64,
    /// How often every engine migrates it.
    pub repetitions: u32,
    /// The engines by name, with their settings for this scenario.
    pub engines: Vec<EngineSetting>,
    /// Where it lies on the axis of a sweep, if it belongs to one.
    pub sweep: Option<SweepPoint>,
}

impl Scenario {
    /// Bytes of the pages that have to be sent at least once: what the workload guest fills or rewrites, but for zero
    /// pages. `None` for a guest whose memory is not known.
    #[must_use]
    pub fn page_bytes(&self) -> Option<u64> {
        let Guest::Workload(words) = &self.guest else { return None };
        let job = Workload::parse(&file::with_network(words, "ip=10.0.0.2/24")).ok()?;
        let fill = job.fill();
        let filled = (u64::from(fill.mib) << 20) * u64::from(100 - fill.shares.zero_percent()) / 100;
        let set_mib = if let Workload::Dirty(dirty) = job { dirty.set_mib } else { 0 };
        Some(filled + (u64::from(set_mib) << 20))
    }

    /// Bytes that [`EngineKind::Tcp`] carries: those asked for, or as many as the guest's pages have, or all of its
    /// memory where that is not known or nothing.
    #[must_use]
    pub fn tcp_bytes(&self) -> u64 {
        let mib = |mib: u32| u64::from(mib) << 20;
        let pages = self.page_bytes().filter(|bytes| *bytes > 0);
        self.tcp_mib.map(mib).or(pages).unwrap_or_else(|| mib(self.memory_mib))
    }

    /// The most memory that the guest will have in use, in MiB, as far as that is known.
    #[must_use]
    pub fn in_use_mib(&self) -> u32 {
        let Guest::Workload(words) = &self.guest else { return self.memory_mib };
        let job = Workload::parse(&file::with_network(words, "ip=10.0.0.2/24"));
        job.map_or(self.memory_mib, |job| job.memory_mib_min().min(self.memory_mib))
    }
}

/// What runs in the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Guest {
    /// The workload guest, with its job in its own words (`ferry run --guest`), network addresses left out.
    Workload(String),
    /// A Linux kernel.
    Linux(LinuxGuest),
}

/// A Linux guest, booted through PVH.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinuxGuest {
    /// The kernel, an ELF file with a PVH note.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// What it writes to its serial console once it is up.
    pub ready: String,
}

/// What lies between the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Link {
    /// Both VMMs on one host, in a network namespace of their own.
    Loopback,
    /// Two namespaces on a switch, as fast as the machine is.
    Veth,
    /// The same, with a token bucket filter at both hosts' uplinks.
    Tbf {
        /// The rate, in Mbit/s.
        rate_mbit_s: f64,
        /// How long a packet may wait in the queue, in ms: the queue's length over the rate.
        queue_ms: f64,
    },
}

/// Who uses the VM while it moves. Only guests with a network have clients, and only on [`Link::Veth`] and
/// [`Link::Tbf`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Client {
    /// Connections that each ask for the guest's file again and again.
    pub http_connections: u32,
    /// Whether a datagram is echoed every millisecond.
    pub udp: bool,
    /// Whether one TCP connection is watched for stalls.
    pub tcp: bool,
}

impl Client {
    /// Whether there is any.
    #[must_use]
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

/// A point of a sweep: scenarios that differ in one quantity and are drawn as one curve.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SweepPoint {
    /// The sweep's name; all its points have it.
    pub name: String,
    /// The quantity.
    pub axis: Axis,
    /// Its value here, in the axis's unit.
    pub value: f64,
}

/// The quantities that a sweep can vary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// How fast the guest dirties memory, MiB/s.
    DirtyRateMibS,
    /// The size of the guest, MiB.
    MemoryMib,
    /// The downtime that is allowed, ms.
    DowntimeMs,
    /// The link's rate, Mbit/s.
    LinkMbitS,
}

impl Axis {
    /// For the axis of a plot.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::DirtyRateMibS => "dirty rate, MiB/s",
            Self::MemoryMib => "guest memory, MiB",
            Self::DowntimeMs => "downtime budget, ms",
            Self::LinkMbitS => "link, Mbit/s",
        }
    }
}

/// An engine as a suite names it: a program with settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EngineConfig {
    /// How scenarios and reports call it, such as `qemu-multifd`.
    pub name: String,
    /// The program.
    pub kind: EngineKind,
    /// Its binary; found by the kind's usual names where absent.
    pub binary: Option<PathBuf>,
}

/// A migration engine that this harness can drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// ferry, through its library.
    Ferry,
    /// QEMU, through QMP.
    Qemu,
    /// Cloud Hypervisor, through its API socket.
    CloudHypervisor,
    /// No VMM: bytes over bare TCP connections between two processes, for what the machine and the link can carry.
    Tcp,
}

/// How one engine migrates in one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EngineSetting {
    /// The engine's name.
    pub engine: String,
    /// What to do about a guest that dirties memory faster than the link takes it.
    pub strategy: Strategy,
    /// Connections that carry pages.
    pub streams: Streams,
    /// How pages are packed.
    pub compression: Compression,
    /// The most that may be sent while the guest runs, in Mbit/s.
    pub bandwidth_mbit_s: Option<f64>,
    /// Whether the engine checks all of memory before the guest resumes, if it can.
    #[serde(default = "checked")]
    pub verify: bool,
    /// What holds the guest's memory.
    #[serde(default)]
    pub memory: MemoryBacking,
    /// Whether memory is handed over within one host, without copying it.
    #[serde(default)]
    pub local: bool,
}

const fn checked() -> bool {
    true
}

/// What to do about a guest that dirties memory faster than the link takes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Nothing: rounds until it fits, or the timeout.
    #[default]
    PreCopy,
    /// Slow its vCPUs down.
    AutoConverge,
    /// Run it at the target and fetch what is missing.
    PostCopy,
}

/// How pages are packed. No engine knows all of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Not at all, besides zero pages.
    #[default]
    None,
    /// As the engine sees fit.
    Auto,
    /// lz4.
    Lz4,
    /// zstd.
    Zstd,
    /// Differences to what was sent before.
    Xbzrle,
}
