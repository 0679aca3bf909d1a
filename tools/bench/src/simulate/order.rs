//! What is to be simulated: one guest, where it goes, and what the caller of the engine would ask for.

use std::time::Duration;

use ferry_migrate::protocol::ident::STREAMS_MAX;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::{Config, MemoryPath, NEGOTIATION_TIMEOUT, OnTimeout};
use ferry_migrate::protocol::{Epoch, MigrationId, VmId};

use super::guest::GuestModel;
use super::hardware::Hardware;
use super::network::{Network, ResourceId};
use super::run::Pair;

/// Bytes of a page.
const PAGE_BYTES: f64 = 4096.0;

/// One migration to simulate.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationOrder {
    /// The guest.
    pub guest: GuestModel,
    /// What is asked for.
    pub settings: Settings,
    /// The way.
    pub route: Route,
    /// How many real pages one of the model stands for: [`GuestModel::page_scale`], or 1 to have it exact.
    pub page_scale: u64,
}

/// What the caller of the engine asks for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The downtime that is allowed.
    pub downtime_budget: Duration,
    /// How long it may take until the guest is stopped.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// How many data streams.
    pub streams: u16,
    /// Whether pages are packed.
    pub compression: Compression,
    /// The most that is sent while the guest runs, in bytes/s.
    pub bandwidth_bytes_per_s: Option<f64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            downtime_budget: Duration::from_millis(300),
            timeout: Duration::from_secs(600),
            on_timeout: OnTimeout::Cancel,
            streams: 1,
            compression: Compression::None,
            bandwidth_bytes_per_s: None,
        }
    }
}

/// The way from a source to a target.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Links that pages pass through, in bytes/s on the wire.
    pub forward: Vec<ResourceId>,
    /// Links that answers pass through.
    pub backward: Vec<ResourceId>,
    /// How long a packet takes, one way, on an idle link.
    pub latency: Duration,
    /// How long it waits more at a link that is full.
    pub queue: Duration,
    /// The source host's processors, in CPU seconds a second.
    pub source_cpu: ResourceId,
    /// The target host's; the same where both run on one machine.
    pub target_cpu: ResourceId,
    /// Whether the guest's vCPUs run on the processors that the migration may use. Otherwise they have their own.
    pub guest_on_cpu: bool,
    /// Whether pages leave through a switch in software.
    pub switched: bool,
}

impl Route {
    /// How long a packet to the target waits in queues now.
    pub(super) fn queue_forward(&self, network: &mut Network) -> Duration {
        self.queued(&self.forward, network)
    }

    /// How long a packet to the source waits in queues now.
    pub(super) fn queue_backward(&self, network: &mut Network) -> Duration {
        self.queued(&self.backward, network)
    }

    fn queued(&self, links: &[ResourceId], network: &mut Network) -> Duration {
        if links.iter().any(|&link| network.is_full(link)) { self.queue } else { Duration::ZERO }
    }

    /// What `streams` connections can carry with the windows that they may have, in bytes/s.
    pub(super) fn window_rate(&self, streams: u16, hardware: &Hardware) -> f64 {
        let round_trip_s = (self.latency * 2).as_secs_f64();
        if round_trip_s > 0.0 { f64::from(streams) * hardware.window_bytes / round_trip_s } else { f64::MAX }
    }
}

/// The most processors that a guest gets of `cores` that it shares with the migration. A vCPU that often waits runs
/// first when it is due, so the migration gets what is left; half of them are always left.
pub(super) fn guest_cores_max(guest: &GuestModel, cores: f64) -> f64 {
    f64::from(guest.cpus).min(cores / 2.0)
}

/// As many streams as fill the link of `pair`: one thread can only feed so many bytes, and one connection can only have
/// so many under way.
#[must_use]
pub fn streams_for(pair: &Pair, hardware: &Hardware) -> u16 {
    let page_us = hardware.source_page_us.max(hardware.target_page_us + hardware.first_touch_page_us);
    let by_thread = PAGE_BYTES / (page_us.max(1e-3) / 1e6);
    let round_trip_s = (pair.latency * 2).as_secs_f64();
    let by_window = if round_trip_s > 0.0 { hardware.window_bytes / round_trip_s } else { f64::INFINITY };
    let wanted = (pair.link_bytes_per_s / by_thread.min(by_window)).ceil();
    // Two threads a stream are of no use beyond the processors; and streams are opened one after another, a round trip
    // each, in the time that negotiating may take.
    let in_time = 0.9 * NEGOTIATION_TIMEOUT.as_secs_f64() / round_trip_s.max(1e-9);
    let most = if by_window < by_thread { in_time } else { in_time.min(pair.cores) };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 64")]
    let streams = wanted.min(most).clamp(1.0, f64::from(STREAMS_MAX)) as u16;
    streams
}

impl MigrationOrder {
    /// What the source's core is told.
    pub(super) fn config(&self) -> Config {
        let Settings { downtime_budget, timeout, on_timeout, streams, compression, bandwidth_bytes_per_s: _ } =
            self.settings;
        Config {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
            name: "guest".parse().expect("a name"),
            epoch: Epoch::FIRST,
            arrived_by: None,
            target: "target:1".to_owned(),
            witness: None,
            description: Vec::new(),
            memory: MemoryPath::Streams,
            streams,
            compression,
            verify: true,
            verify_whole: false,
            reconnect: Duration::ZERO,
            downtime_budget,
            timeout,
            on_timeout,
        }
    }
}
