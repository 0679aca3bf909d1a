//! What a simulated migration came to, and the simplest way to have one: two hosts and a link of their own.

use std::time::Duration;

use ferry_migrate::report::MigrationReport;
use serde::Serialize;

use super::guest::{GuestError, GuestModel};
use super::hardware::Hardware;
use super::order::{MigrationOrder, Route, Settings};
use super::world::World;

/// A simulated migration.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationRun {
    /// How it ended.
    pub ending: Ending,
    /// From the order to the end.
    pub took: Duration,
    /// How long the guest stood still, if it did: the downtime as the guest sees it.
    pub standstill: Option<Duration>,
    /// Bytes on the wire, headers included.
    pub wire_bytes: f64,
    /// CPU time for pages at the source, in s.
    pub source_cpu_s: f64,
    /// CPU time for pages at the target, in s.
    pub target_cpu_s: f64,
    /// Every round, the one of the standstill included.
    pub rounds: Vec<RoundLine>,
    /// What ferry itself would report, if the guest moved.
    pub report: Option<MigrationReport>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Ending {
    /// The guest runs at the target.
    Moved,
    /// It goes on at the source.
    Stayed {
        /// In the core's own words.
        reason: String,
        /// Whether time was over.
        timeout: bool,
    },
}

/// A round as it went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RoundLine {
    /// Counted from 1.
    pub round: u32,
    /// When it began, since the order.
    pub from_ms: f64,
    /// How long it took, until all had arrived.
    pub ms: f64,
    /// Pages that were dirty when it began.
    pub dirty_pages: u64,
    /// Of these: zero.
    pub zero_pages: u64,
    /// Of these: packed.
    pub packed_pages: u64,
    /// Bytes on the data streams.
    pub wire_bytes: u64,
    /// Pages dirtied a second meanwhile; none for the last round.
    pub dirtied_pages_per_s: Option<f64>,
    /// The downtime that the core expected if it stopped then.
    pub forecast_ms: Option<f64>,
    /// The downtime that it took to be hardly exceeded: what is compared with the budget.
    pub forecast_upper_ms: Option<f64>,
}

/// Two hosts and what lies between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// The link's rate on the wire, in bytes/s; infinite for none.
    pub link_bytes_per_s: f64,
    /// One way.
    pub latency: Duration,
    /// How long packets wait at the link when it is full.
    pub queue: Duration,
    /// Processors of a host that the migration may use.
    pub cores: f64,
    /// Whether source, target and guest share them: all on one machine.
    pub one_machine: bool,
    /// Whether pages leave through a switch in software.
    pub switched: bool,
    /// How many real pages one of the model stands for; by the guest's size if not given.
    pub page_scale: Option<u64>,
}

/// Simulates one migration between hosts that do nothing else.
///
/// # Errors
/// [`GuestError`] if there can't be such a guest.
pub fn migrate_one(
    guest: &GuestModel,
    settings: Settings,
    pair: Pair,
    hardware: &Hardware,
    seed: u64,
) -> Result<MigrationRun, GuestError> {
    let mut world = World::new(*hardware, seed);
    let network = world.network();
    let source_cpu = network.add_resource(pair.cores);
    let target_cpu = if pair.one_machine { source_cpu } else { network.add_resource(pair.cores) };
    let mut link = || {
        let rate = pair.link_bytes_per_s;
        if rate.is_finite() { vec![network.add_resource(rate)] } else { Vec::new() }
    };
    let (forward, backward) = (link(), link());
    let route = Route {
        forward,
        backward,
        latency: pair.latency,
        queue: pair.queue,
        source_cpu,
        target_cpu,
        guest_on_cpu: pair.one_machine,
        switched: pair.switched,
    };
    let page_scale = pair.page_scale.unwrap_or_else(|| guest.page_scale());
    world.order(MigrationOrder { guest: guest.clone(), settings, route, page_scale })?;
    let (_, run) = world.run_to_next_end().expect("the core's timeouts end every migration");
    Ok(run)
}
