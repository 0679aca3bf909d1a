//! Who goes when and where: each host's VMs in the order of the plan, within every host's limits; a VM that stayed
//! waits behind all others for its next attempt.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::OnTimeout;
use serde::Serialize;

use super::fleet::{Vm, fleet, gib};
use super::site::{Racks, Site, Then};
use crate::simulate::guest::GuestError;
use crate::simulate::hardware::Hardware;
use crate::simulate::network::{Network, ResourceId};
use crate::simulate::order::{MigrationOrder, Route, Settings};
use crate::simulate::run::{Ending, MigrationRun};
use crate::simulate::world::{MigrationIndex, World};

/// An evacuation as it went.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evacuation {
    /// When the last VM had moved or was given up, in s.
    pub took_s: f64,
    /// Every VM, in the order of the plan.
    pub vms: Vec<VmLine>,
    /// Bytes on the wire, attempts that failed included.
    pub wire_bytes: f64,
    /// CPU time for pages on all hosts, in s.
    pub cpu_s: f64,
    /// How many VMs were left, each from that second on.
    pub left: Vec<(f64, usize)>,
}

/// One VM.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VmLine {
    /// Which kind of the site's.
    pub kind: usize,
    /// Its memory, in GiB.
    pub memory_gib: f64,
    /// The source host, numbered through all racks.
    pub source: usize,
    /// Every attempt.
    pub attempts: Vec<AttemptLine>,
    /// The downtime by ferry's own word, in ms, if it moved.
    pub downtime_ms: Option<f64>,
    /// How long it stood still, in ms.
    pub standstill_ms: Option<f64>,
    /// How it ended.
    pub end: VmEnd,
}

/// One attempt to move a VM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AttemptLine {
    /// When it began, in s.
    pub from_s: f64,
    /// When it ended, in s.
    pub to_s: f64,
    /// The target host, numbered through all racks.
    pub target: usize,
}

impl AttemptLine {
    /// How long it took, in s.
    #[must_use]
    pub fn took_s(&self) -> f64 {
        self.to_s - self.from_s
    }
}

/// How it ended for a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum VmEnd {
    /// It runs at its target.
    Moved,
    /// It goes on at its source after all attempts.
    Stayed {
        /// Why the last attempt was given up.
        reason: String,
    },
    /// No target host has room for it.
    NoRoom,
}

/// A host on either side.
#[derive(Debug)]
struct HostState {
    rack: usize,
    link: ResourceId,
    back: ResourceId,
    cpu: ResourceId,
    busy: u32,
    free_gib: f64,
    /// Its VMs that have not gone yet, with which attempt is next.
    queue: VecDeque<(usize, usize)>,
}

/// One side's hosts and rack links, pages' direction and the other.
#[derive(Debug)]
struct Side {
    hosts: Vec<HostState>,
    uplinks: Vec<(ResourceId, ResourceId)>,
}

#[derive(Debug)]
struct Conductor<'a> {
    site: &'a Site,
    vms: Vec<Vm>,
    lines: Vec<VmLine>,
    world: World,
    source: Side,
    target: Side,
    between: Option<(ResourceId, ResourceId)>,
    /// Which VM a migration is of, and which attempt.
    under_way: BTreeMap<MigrationIndex, (usize, usize)>,
    wire_bytes: f64,
    cpu_s: f64,
    left: Vec<(f64, usize)>,
}

/// Empties the source hosts of `site`; `progress` hears how many VMs are left.
///
/// # Errors
/// [`GuestError`] if a VM of a kind can't be.
pub fn evacuate(
    site: &Site,
    hardware: &Hardware,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<Evacuation, GuestError> {
    let mut conductor = Conductor::new(site, hardware, seed);
    conductor.start_all()?;
    while let Some((index, run)) = conductor.world.run_to_next_end() {
        conductor.ended(index, &run);
        conductor.start_all()?;
        if let Some((_, left)) = conductor.left.last() {
            progress(*left);
        }
    }
    Ok(conductor.finish())
}

fn bytes_per_s(gbit_s: f64) -> f64 {
    gbit_s * 1e9 / 8.0
}

impl Side {
    fn new(racks: &Racks, site: &Site, network: &mut Network) -> Self {
        let mut both = |gbit_s: f64| {
            (network.add_resource(bytes_per_s(gbit_s)), network.add_resource(bytes_per_s(gbit_s)))
        };
        let uplinks: Vec<_> = (0..racks.racks).map(|_| both(racks.uplink_gbit_s)).collect();
        let mut hosts = Vec::new();
        for rack in 0..uplinks.len() {
            for _ in 0..racks.hosts_per_rack {
                let (link, back) = both(racks.host_gbit_s);
                let free_gib = site.host.memory_gib * (1.0 - racks.used_percent / 100.0);
                hosts.push((rack, link, back, free_gib));
            }
        }
        let state = |(rack, link, back, free_gib): (usize, ResourceId, ResourceId, f64)| HostState {
            rack,
            link,
            back,
            cpu: network.add_resource(site.host.cores),
            busy: 0,
            free_gib,
            queue: VecDeque::new(),
        };
        Self { hosts: hosts.into_iter().map(state).collect(), uplinks }
    }
}

impl<'a> Conductor<'a> {
    fn new(site: &'a Site, hardware: &Hardware, seed: u64) -> Self {
        let mut world = World::new(*hardware, seed);
        let vms = fleet(site, seed);
        let network = world.network();
        let mut source = Side::new(&site.source, site, network);
        let target = Side::new(&site.target, site, network);
        let between = site.between.gbit_s.map(|gbit_s| {
            (network.add_resource(bytes_per_s(gbit_s)), network.add_resource(bytes_per_s(gbit_s)))
        });
        for (number, vm) in vms.iter().enumerate() {
            source.hosts[vm.host].queue.push_back((number, 0));
        }
        let line = |vm: &Vm| VmLine {
            kind: vm.kind,
            memory_gib: gib(vm),
            source: vm.host,
            attempts: Vec::new(),
            downtime_ms: None,
            standstill_ms: None,
            end: VmEnd::NoRoom,
        };
        Self {
            site,
            lines: vms.iter().map(line).collect(),
            left: vec![(0.0, vms.len())],
            vms,
            world,
            source,
            target,
            between,
            under_way: BTreeMap::new(),
            wire_bytes: 0.0,
            cpu_s: 0.0,
        }
    }

    /// Starts whatever may start: of the source hosts that may send, the one whose next VM comes first in the plan.
    fn start_all(&mut self) -> Result<(), GuestError> {
        let at_once_max = self.site.plan.at_once_max.map_or(usize::MAX, |most| most.get());
        while self.under_way.len() < at_once_max {
            let may_send = |host: &&HostState| host.busy < self.site.host.out_max;
            let may_take = |host: &&HostState| host.busy < self.site.host.in_max;
            let room = self.target.hosts.iter().filter(may_take).map(|host| host.free_gib);
            let Some(room) = room.reduce(f64::max) else { return Ok(()) };
            let next = self.source.hosts.iter().filter(may_send).filter_map(|host| {
                let mut candidates = host.queue.iter().map(|(vm, attempt)| (*attempt, *vm));
                candidates.find(|(_, vm)| self.lines[*vm].memory_gib <= room)
            });
            let Some((attempt, vm)) = next.min() else { return Ok(()) };
            let Some(target) = self.target_for(vm) else { return Ok(()) };
            self.start(vm, attempt, target)?;
        }
        Ok(())
    }

    /// The host that should take `vm`: the one that takes in the fewest now, and of these the emptiest.
    fn target_for(&self, vm: usize) -> Option<usize> {
        let needed = self.lines[vm].memory_gib;
        let fits = |host: &HostState| host.busy < self.site.host.in_max && host.free_gib >= needed;
        let hosts = self.target.hosts.iter().enumerate().filter(|(_, host)| fits(host));
        let best = hosts
            .min_by(|(_, a), (_, b)| a.busy.cmp(&b.busy).then_with(|| b.free_gib.total_cmp(&a.free_gib)));
        best.map(|(index, _)| index)
    }

    fn start(&mut self, vm: usize, attempt: usize, target: usize) -> Result<(), GuestError> {
        let from = self.vms[vm].host;
        let route = self.route(from, target);
        let asked = self.site.plan.attempts[attempt];
        let settings = Settings {
            downtime_budget: Duration::from_secs_f64(asked.downtime_ms / 1e3),
            timeout: Duration::from_secs_f64(asked.timeout_s),
            on_timeout: match asked.on_timeout {
                Then::Cancel => OnTimeout::Cancel,
                Then::Stop => OnTimeout::Stop,
            },
            streams: self.site.plan.streams,
            compression: if self.site.plan.lz4 { Compression::Lz4 } else { Compression::None },
            bandwidth_bytes_per_s: None,
        };
        let guest = self.vms[vm].guest.clone();
        let page_scale = guest.page_scale();
        let index = self.world.order(MigrationOrder { guest, settings, route, page_scale })?;
        self.under_way.insert(index, (vm, attempt));
        let host = &mut self.source.hosts[from];
        host.busy += 1;
        host.queue.retain(|(queued, _)| *queued != vm);
        let host = &mut self.target.hosts[target];
        host.busy += 1;
        host.free_gib -= self.lines[vm].memory_gib;
        let now = self.world.now().as_secs_f64();
        self.lines[vm].attempts.push(AttemptLine { from_s: now, to_s: now, target });
        Ok(())
    }

    fn route(&self, from: usize, to: usize) -> Route {
        let (from, to) = (&self.source.hosts[from], &self.target.hosts[to]);
        let (out, out_back) = self.source.uplinks[from.rack];
        let (into, into_back) = self.target.uplinks[to.rack];
        let mut forward = vec![from.link, out];
        let mut backward = vec![to.back, into_back];
        if let Some((between, between_back)) = self.between {
            forward.push(between);
            backward.push(between_back);
        }
        forward.extend([into, to.link]);
        backward.extend([out_back, from.back]);
        Route {
            forward,
            backward,
            latency: Duration::from_secs_f64(self.site.between.latency_ms / 1e3),
            queue: Duration::from_secs_f64(self.site.between.queue_ms / 1e3),
            source_cpu: from.cpu,
            target_cpu: to.cpu,
            guest_on_cpu: false,
            switched: false,
        }
    }

    fn ended(&mut self, index: MigrationIndex, run: &MigrationRun) {
        let Some((vm, attempt)) = self.under_way.remove(&index) else { return };
        let now = self.world.now().as_secs_f64();
        let line = &mut self.lines[vm];
        let Some(last) = line.attempts.last_mut() else { return };
        last.to_s = now;
        let to = &mut self.target.hosts[last.target];
        to.busy -= 1;
        line.downtime_ms = run.report.as_ref().map(|report| report.downtime_ms);
        line.standstill_ms = run.standstill.map(|still| still.as_secs_f64() * 1e3);
        self.wire_bytes += run.wire_bytes;
        self.cpu_s += run.source_cpu_s + run.target_cpu_s;
        let memory_gib = line.memory_gib;
        let from = &mut self.source.hosts[self.vms[vm].host];
        from.busy -= 1;
        let over = match &run.ending {
            Ending::Moved => {
                line.end = VmEnd::Moved;
                true
            }
            Ending::Stayed { reason, .. } => {
                line.end = VmEnd::Stayed { reason: reason.clone() };
                to.free_gib += memory_gib;
                let again = attempt + 1 < self.site.plan.attempts.len();
                if again {
                    from.queue.push_back((vm, attempt + 1));
                }
                !again
            }
        };
        if over && let Some((_, left)) = self.left.last().copied() {
            self.left.push((now, left.saturating_sub(1)));
        }
    }

    fn finish(self) -> Evacuation {
        Evacuation {
            took_s: self.world.now().as_secs_f64(),
            vms: self.lines,
            wire_bytes: self.wire_bytes,
            cpu_s: self.cpu_s,
            left: self.left,
        }
    }
}
