//! What the model makes of a suite's scenario: the same guest, link and settings, so that real runs can be predicted.

use std::time::Duration;

use ferry_guest_abi::Workload;
use ferry_guest_abi::workload::{self, Dirty, Fill, Rate};
use ferry_migrate::protocol::layout::PAGE_BYTES_U64;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::OnTimeout;

use super::costs::float;
use super::guest::{GuestModel, Order, WorkingSet};
use super::order::{Settings, guest_cores_max};
use super::run::Pair;
use crate::scenario::{self, EngineSetting, Guest, Link, Scenario, Strategy, file};

const MIB: u64 = 1 << 20;

/// Pages that the workload guest writes whatever its job: its report, stacks and descriptor tables.
const OWN_PAGES: u64 = 5;

/// How often it writes each of them a second: with every heartbeat.
const OWN_WRITES_PER_S: f64 = 1000.0;

/// What a web server of the workload guest writes to: rings and buffers, and how fast under load.
const SERVING: (u64, f64) = (2 * MIB, 40_000.0);

/// One machine with both hosts, as the harness has it.
#[derive(Debug, Clone, PartialEq)]
pub struct RealOrder {
    /// The guest.
    pub guest: GuestModel,
    /// What ferry was asked for.
    pub settings: Settings,
    /// The link, and the machine that both hosts share.
    pub pair: Pair,
}

impl RealOrder {
    /// The most processors that the guest gets beside the migration.
    pub(super) fn guest_cores_max(&self) -> f64 {
        guest_cores_max(&self.guest, self.pair.cores)
    }
}

/// The scenario as `setting`'s engine ran it on a machine with `cores` processors; in words why not, if it can't be
/// modelled.
///
/// # Errors
/// A sentence.
pub fn order(scenario: &Scenario, setting: &EngineSetting, cores: u32) -> Result<RealOrder, String> {
    if setting.strategy != Strategy::PreCopy {
        return Err("only pre-copy is modelled".to_owned());
    }
    let Some(streams) = setting.streams.fixed() else {
        return Err("only a fixed number of streams is modelled".to_owned());
    };
    let compression = match setting.compression {
        scenario::Compression::None => Compression::None,
        scenario::Compression::Lz4 => Compression::Lz4,
        scenario::Compression::Auto | scenario::Compression::Zstd | scenario::Compression::Xbzrle => {
            return Err("only lz4 is modelled".to_owned());
        }
    };
    let guest = match &scenario.guest {
        Guest::Workload(words) => workload_guest(words, u64::from(scenario.memory_mib), scenario.cpus)?,
        Guest::Linux(_) => return Err("what a Linux guest writes is not known".to_owned()),
    };
    let settings = Settings {
        downtime_budget: Duration::from_secs_f64(scenario.downtime_ms / 1e3),
        timeout: Duration::from_secs_f64(scenario.timeout_s),
        on_timeout: OnTimeout::Cancel,
        streams,
        compression,
        bandwidth_bytes_per_s: setting.bandwidth_mbit_s.map(|mbit_s| mbit_s * 1e6 / 8.0),
    };
    Ok(RealOrder { guest, settings, pair: pair(scenario.link, cores) })
}

fn pair(link: Link, cores: u32) -> Pair {
    let (link_bytes_per_s, queue) = match link {
        Link::Loopback | Link::Veth => (f64::INFINITY, Duration::ZERO),
        Link::Tbf { rate_mbit_s, queue_ms } => {
            (rate_mbit_s * 1e6 / 8.0, Duration::from_secs_f64(queue_ms / 1e3))
        }
    };
    // What a packet needs on such a link is part of what a message costs.
    Pair {
        link_bytes_per_s,
        latency: Duration::ZERO,
        queue,
        cores: f64::from(cores.max(1)),
        one_machine: true,
        switched: link != Link::Loopback,
        page_scale: None,
    }
}

fn workload_guest(words: &str, memory_mib: u64, cpus: u8) -> Result<GuestModel, String> {
    let words = file::with_network(words, "ip=10.0.0.2/24");
    let job = Workload::parse(&words).map_err(|error| error.to_string())?;
    let Fill { mib, shares, .. } = job.fill();
    let filled = float(u64::from(mib) * MIB);
    let of_filled = |percent: u8| filled * f64::from(percent) / 100.0;
    let own = WorkingSet {
        bytes: OWN_PAGES * PAGE_BYTES_U64,
        pages_per_s: float(OWN_PAGES) * OWN_WRITES_PER_S,
        order: Order::Linear,
        packable_share: 1.0,
    };
    let mut sets = vec![own];
    match job {
        Workload::Idle | Workload::Fill(_) => {}
        Workload::Dirty(dirty) => sets.push(dirty_set(&dirty)),
        Workload::Http(_) => sets.push(WorkingSet {
            bytes: SERVING.0,
            pages_per_s: SERVING.1,
            order: Order::Uniform,
            packable_share: 1.0,
        }),
    }
    let in_sets: u64 = sets.iter().map(|set| set.bytes).sum();
    let rest = float((memory_mib * MIB).saturating_sub(in_sets)).max(1.0);
    Ok(GuestModel {
        memory_bytes: memory_mib * MIB,
        cpus: u16::from(cpus),
        untouched_share: (rest - filled).max(0.0) / rest,
        zero_share: of_filled(shares.zero_percent()) / rest,
        packable_share: of_filled(shares.text_percent()) / rest,
        sets,
    })
}

fn dirty_set(dirty: &Dirty) -> WorkingSet {
    let pages_per_mib = float(MIB / PAGE_BYTES_U64);
    WorkingSet {
        bytes: u64::from(dirty.set_mib) * MIB,
        pages_per_s: match dirty.rate {
            Rate::MibPerSecond(rate) => f64::from(rate) * pages_per_mib,
            // More than it can: what a logged write costs holds it back.
            Rate::Max => 1e9,
        },
        order: match dirty.order {
            workload::Order::Linear => Order::Linear,
            workload::Order::Random => Order::Shuffled,
        },
        packable_share: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_suite_can_be_modelled() {
        let suite = file::load("standard").unwrap();
        let mut modelled = 0;
        for scenario in &suite.scenarios {
            for setting in scenario.engines.iter().filter(|setting| setting.engine.starts_with("ferry")) {
                let order = order(scenario, setting, 2).unwrap();
                order.guest.layout(1).unwrap();
                modelled += 1;
            }
        }
        assert!(modelled > 12);
    }

    #[test]
    fn pages_are_of_the_kinds_that_the_words_say() {
        let guest =
            workload_guest("dirty rate=50 set=128 fill=320 zero=25 text=50 random=25", 512, 1).unwrap();
        let rest_mib = 512.0 - 128.0;
        assert!((guest.untouched_share - (rest_mib - 320.0) / rest_mib).abs() < 1e-3, "{guest:?}");
        assert!((guest.zero_share - 80.0 / rest_mib).abs() < 1e-3, "{guest:?}");
        assert!((guest.packable_share - 160.0 / rest_mib).abs() < 1e-3);
        assert_eq!((guest.sets[1].bytes, guest.sets[1].pages_per_s), (128 * MIB, 50.0 * 256.0));
        assert!(workload_guest("idle", 512, 1).unwrap().untouched_share > 0.999);
    }
}
