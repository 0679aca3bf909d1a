//! Downtime as the guest sees it: a real KVM guest migrates through the library, and what criterion takes for the
//! time of an iteration is the guest's longest gap between two heartbeats.
//!
//! Beside it `source` is the engine's own word for the same migrations. Not here: peers and links, which are
//! ferry-bench's.

use std::cell::RefCell;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use ferry_tests::guest::{Guest, boot, config, has_kvm, move_guest};
use ferry_vmm::Backing;
use tokio::runtime::{Builder, Runtime};

const GUEST_MIB: u64 = 320;

/// Guests that stand still for different reasons.
const WORKLOADS: [(&str, &str); 3] = [
    ("idle", "fill mib=256 random=100 verify=0"),
    ("dirty-100", "dirty rate=100 set=64 fill=192 random=100 verify=0"),
    ("dirty-500", "dirty rate=500 set=64 fill=192 random=100 verify=0"),
];

/// The budget: what is measured is how far below it the engine stays.
const BUDGET: Duration = Duration::from_millis(50);

/// A guest that goes from machine to machine.
struct Traveller {
    runtime: Runtime,
    guest: RefCell<Option<Guest>>,
}

/// One migration: the guest's gap and the engine's downtime.
struct Standstill {
    guest: Duration,
    source: Duration,
}

impl Traveller {
    fn new(workload: &str) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        let guest = boot(workload, &config(GUEST_MIB, 1, Backing::PrivateAnonymous));
        Self { runtime, guest: RefCell::new(Some(guest)) }
    }

    fn migrate(&self) -> Standstill {
        let guest = self.guest.take().expect("it always comes back");
        let since = guest.healthy().heartbeat_tsc;
        let (guest, summary) =
            self.runtime.block_on(move_guest(guest, |options| options.downtime_budget = BUDGET));
        let report = guest.goes_on();
        let ticks = report.largest_gap_since(since).map_or(0, |gap| gap.length_ticks);
        let gap_ms = report.gap_ms(ticks).expect("the guest knows its clock");
        self.guest.replace(Some(guest));
        Standstill { guest: Duration::from_secs_f64(gap_ms / 1e3), source: summary.downtime.total() }
    }
}

fn downtime(criterion: &mut Criterion) {
    if !has_kvm() {
        return;
    }
    let mut group = criterion.benchmark_group("downtime");
    // Criterion plans with the time it is told of, the standstill, while a migration takes a hundred times as long:
    // a short measurement makes it a few migrations a sample.
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_millis(100));
    for (name, workload) in WORKLOADS {
        let traveller = Traveller::new(workload);
        let of = |part: fn(&Standstill) -> Duration| {
            let traveller = &traveller;
            move |bencher: &mut criterion::Bencher<'_>| {
                bencher.iter_custom(|count| (0..count).map(|_| part(&traveller.migrate())).sum());
            }
        };
        group.bench_function(format!("{name}/guest"), of(|standstill| standstill.guest));
        group.bench_function(format!("{name}/source"), of(|standstill| standstill.source));
    }
    group.finish();
}

criterion_group!(benches, downtime);
criterion_main!(benches);
