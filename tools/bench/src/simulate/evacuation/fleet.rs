//! The VMs of a site, drawn from its distributions by its seed, in the order of its plan.

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use rand_xoshiro::Xoshiro256PlusPlus;

use super::site::{PlanOrder, Site, Spread, VmKind, Written};
use crate::simulate::costs::{float, round};
use crate::simulate::guest::{GuestModel, Order, WorkingSet};

const GIB: f64 = 1_073_741_824.0;

/// A VM that is to be evacuated.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Vm {
    /// Which kind of the site's.
    pub(super) kind: usize,
    /// Which source host it runs on.
    pub(super) host: usize,
    pub(super) guest: GuestModel,
}

/// All VMs, those first that go first.
pub(super) fn fleet(site: &Site, seed: u64) -> Vec<Vm> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut vms = Vec::new();
    for host in 0..site.source.hosts() {
        for (kind, vm_kind) in site.vms.iter().enumerate() {
            for _ in 0..vm_kind.per_host {
                let guest = guest(vm_kind, &mut random);
                vms.push(Vm { kind, host: usize::try_from(host).unwrap_or(usize::MAX), guest });
            }
        }
    }
    match site.plan.order {
        PlanOrder::SmallestFirst => vms.sort_by_key(|vm| vm.guest.memory_bytes),
        PlanOrder::LargestFirst => vms.sort_by_key(|vm| std::cmp::Reverse(vm.guest.memory_bytes)),
        PlanOrder::QuietestFirst => {
            vms.sort_by(|a, b| a.guest.pages_per_s().total_cmp(&b.guest.pages_per_s()));
        }
        PlanOrder::Shuffled => vms.shuffle(&mut random),
    }
    vms
}

fn guest(kind: &VmKind, random: &mut Xoshiro256PlusPlus) -> GuestModel {
    let memory_gib = draw(&kind.memory_gib, random);
    // Whole pages of 2 MiB, as VMs have them.
    let memory_bytes = round(memory_gib * 512.0) * (2 << 20);
    let cpus = round(memory_gib / kind.gib_per_cpu).clamp(1, 512);
    let mut set = |written: &Written| {
        let bytes = float(memory_bytes) * written.percent / 100.0;
        WorkingSet {
            bytes: round(bytes),
            pages_per_s: bytes / 4096.0 / draw(&written.rewritten_every_s, random),
            order: Order::Uniform,
            packable_share: 0.0,
        }
    };
    let sets = [&kind.hot, &kind.cold].into_iter().filter(|written| written.percent > 0.0).map(&mut set);
    GuestModel {
        memory_bytes,
        cpus: u16::try_from(cpus).unwrap_or(u16::MAX),
        untouched_share: kind.untouched_percent / 100.0,
        zero_share: kind.zero_percent / 100.0,
        packable_share: kind.packable_percent / 100.0,
        sets: sets.collect(),
    }
}

fn draw(spread: &Spread, random: &mut impl Rng) -> f64 {
    let Spread { median, sigma, min, max } = *spread;
    LogNormal::new(median.ln(), sigma).map_or(median, |spread| spread.sample(random)).clamp(min, max)
}

/// The memory of `vm` in GiB.
pub(super) fn gib(vm: &Vm) -> f64 {
    float(vm.guest.memory_bytes) / GIB
}
