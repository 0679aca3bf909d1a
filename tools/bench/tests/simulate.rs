//! What must hold of the model whatever its parameters: the production core in virtual time, checked from outside.

use std::time::Duration;

use ferry_bench::simulate::{
    Ending, GuestModel, Hardware, MigrationRun, Order, Pair, Settings, WorkingSet, migrate_one,
};
use ferry_migrate::protocol::source::OnTimeout;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const MS: Duration = Duration::from_millis(1);

/// 10 Gbit/s between two hosts with enough processors.
fn pair() -> Pair {
    Pair {
        link_bytes_per_s: 1.25e9,
        latency: Duration::from_micros(50),
        queue: Duration::ZERO,
        cores: 16.0,
        one_machine: false,
        switched: false,
        page_scale: None,
    }
}

fn dirtying(memory_bytes: u64, set_bytes: u64, mib_per_s: f64, order: Order) -> GuestModel {
    let set = WorkingSet { bytes: set_bytes, pages_per_s: mib_per_s * 256.0, order, packable_share: 0.0 };
    GuestModel { sets: vec![set], ..GuestModel::idle(memory_bytes, 1) }
}

fn run(guest: &GuestModel, settings: Settings, pair: Pair) -> MigrationRun {
    migrate_one(guest, settings, pair, &Hardware::default(), 1).expect("a guest")
}

fn s(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

#[test]
fn a_guest_that_outruns_the_link_ends_as_the_core_decides() {
    // 2 GiB/s over 4 GiB against 1.1 GiB/s: all of the set is dirty again after every round.
    let guest = dirtying(8 * GIB, 4 * GIB, 2048.0, Order::Linear);
    let timeout = Duration::from_secs(30);
    let settings = Settings { timeout, ..Settings::default() };
    let cancelled = run(&guest, settings, pair());
    let Ending::Stayed { reason, timeout: true } = &cancelled.ending else { panic!("{cancelled:?}") };
    assert!(reason.contains("the guest dirties 1125 MiB/s, the link takes 1136 MiB/s"), "{reason}");
    assert_eq!(cancelled.standstill, None, "it was never stopped");
    assert!((s(cancelled.took) - s(timeout)).abs() < 0.1, "{:?}", cancelled.took);

    let forced = run(&guest, Settings { on_timeout: OnTimeout::Stop, ..settings }, pair());
    assert_eq!(forced.ending, Ending::Moved);
    assert!(forced.took >= timeout, "{:?}", forced.took);
    let standstill = forced.standstill.expect("it was stopped");
    // At most all of the set, twice over while it was being stopped; never less than half of it.
    assert!((1.5..4.5).contains(&s(standstill)), "{standstill:?}");
}

#[test]
fn a_bandwidth_cap_holds_until_the_guest_stands_still() {
    let guest = dirtying(2 * GIB, 64 * MIB, 20.0, Order::Linear);
    let capped = Settings { bandwidth_bytes_per_s: Some(250e6), ..Settings::default() };
    let run = run(&guest, capped, pair());
    assert_eq!(run.ending, Ending::Moved);
    let first = run.rounds[0];
    assert!((first.ms - first.wire_bytes as f64 / 250e6 * 1e3).abs() < 5.0, "{first:?}");
    let last = run.rounds[run.rounds.len() - 1];
    assert!(last.dirty_pages > 500 && last.ms < last.wire_bytes as f64 / 500e6 * 1e3, "{last:?}");
}

#[test]
fn latency_costs_round_trips_and_windows() {
    let guest = GuestModel::idle(GIB, 1);
    let patient = Settings { downtime_budget: 2000 * MS, ..Settings::default() };
    let near = run(&guest, patient, pair());
    let far = Pair { latency: 100 * MS, ..pair() };
    let one = run(&guest, patient, far);
    // One connection has 4 MiB under way in 200 ms.
    let least = GIB as f64 / (4.0 * MIB as f64 / 0.2);
    assert!(s(one.took) > least && s(one.took) < least * 1.1, "{:?}", one.took);
    let many = run(&guest, Settings { streams: 16, ..patient }, far);
    assert!(s(many.took) < s(one.took) / 5.0, "{:?}", many.took);
    // Prepare and Prepared, Commit and Running: the guest sees one and a half of these round trips.
    let (near, one) = (near.standstill.expect("it moved"), one.standstill.expect("it moved"));
    assert!((s(one) - s(near) - 0.4).abs() < 0.15, "{near:?} {one:?}");
}

#[test]
fn a_seed_decides_everything_and_chances_matter() {
    let guest = dirtying(4 * GIB, 512 * MIB, 300.0, Order::Uniform);
    let noisy = Hardware { jitter: 0.3, page_jitter: 0.1, ..Hardware::default() };
    let run = |seed| migrate_one(&guest, Settings::default(), pair(), &noisy, seed).expect("a guest");
    assert_eq!(run(7), run(7));
    assert_ne!(run(7).took, run(8).took);
}

#[test]
fn a_terabyte_and_512_vcpus_are_not_scaled() {
    let guest = GuestModel { cpus: 512, ..dirtying(1 << 40, 64 * GIB, 4096.0, Order::Uniform) };
    let settings = Settings { streams: 8, timeout: Duration::from_secs(3600), ..Settings::default() };
    let run = run(&guest, settings, Pair { link_bytes_per_s: 12.5e9, ..pair() });
    assert_eq!(run.ending, Ending::Moved, "{run:?}");
    assert_eq!(run.rounds[0].dirty_pages, 1 << 28);
    assert!(s(run.took) > run.wire_bytes / 12.5e9);
}

/// Relative differences, sorted by size.
fn differences(pairs: impl Iterator<Item = (f64, f64)>) -> Vec<f64> {
    let mut differences: Vec<f64> = pairs.map(|(a, b)| (a / b - 1.0).abs()).collect();
    differences.sort_by(f64::total_cmp);
    differences
}

#[test]
fn larger_pages_change_little() {
    let mut runs = Vec::new();
    for order in [Order::Linear, Order::Shuffled, Order::Uniform] {
        for mib_per_s in [50.0, 200.0, 600.0] {
            for set_bytes in [256 * MIB, 2 * GIB] {
                for link_bytes_per_s in [1.25e9, 5e9] {
                    let guest = dirtying(6 * GIB, set_bytes, mib_per_s, order);
                    let settings = Settings { streams: 2, ..Settings::default() };
                    let scaled = |scale| {
                        run(&guest, settings, Pair { link_bytes_per_s, page_scale: Some(scale), ..pair() })
                    };
                    runs.push((scaled(1), scaled(16)));
                }
            }
        }
    }
    assert!(
        runs.iter().all(|(exact, scaled)| exact.ending == scaled.ending && exact.ending == Ending::Moved)
    );
    let total = differences(runs.iter().map(|(exact, scaled)| (s(scaled.took), s(exact.took))));
    let standstill = |run: &MigrationRun| s(run.standstill.expect("it moved"));
    let downtime = differences(runs.iter().map(|(exact, scaled)| (standstill(scaled), standstill(exact))));
    let bytes = differences(runs.iter().map(|(exact, scaled)| (scaled.wire_bytes, exact.wire_bytes)));
    println!("total {total:?}\ndowntime {downtime:?}\nbytes {bytes:?}");
    let (middle, last) = (runs.len() / 2, runs.len() - 1);
    assert!(total[middle] < 0.001 && total[last] < 0.02, "{total:?}");
    assert!(bytes[middle] < 0.001 && bytes[last] < 0.02, "{bytes:?}");
    assert!(downtime[middle] < 0.02 && downtime[last] < 0.2, "{downtime:?}");
}

/// Whatever is asked of the model.
fn anything() -> impl Strategy<Value = (GuestModel, Settings, Pair)> {
    let guest = (64u64..8192, 0.0f64..0.9, 1u64..100, 0.0f64..3000.0, 0usize..3, 1u16..3).prop_map(
        |(memory_mib, zero_share, set_percent, mib_per_s, order, cpus)| {
            let order = [Order::Linear, Order::Shuffled, Order::Uniform][order];
            let set_bytes = (memory_mib * MIB * set_percent / 100).max(MIB);
            GuestModel { zero_share, cpus, ..dirtying(memory_mib * MIB, set_bytes, mib_per_s, order) }
        },
    );
    let settings =
        (20u64..1000, 1u64..20, any::<bool>(), 1u16..9).prop_map(|(budget_ms, timeout_s, stops, streams)| {
            Settings {
                downtime_budget: Duration::from_millis(budget_ms),
                timeout: Duration::from_secs(timeout_s),
                on_timeout: if stops { OnTimeout::Stop } else { OnTimeout::Cancel },
                streams,
                ..Settings::default()
            }
        });
    let pair = (12.5e6f64..50e9, 0u64..20_000, 0u64..10_000, any::<bool>()).prop_map(
        |(link_bytes_per_s, latency_us, queue_us, one_machine)| Pair {
            link_bytes_per_s,
            latency: Duration::from_micros(latency_us),
            queue: Duration::from_micros(queue_us),
            cores: 2.0,
            one_machine,
            switched: false,
            page_scale: None,
        },
    );
    (guest, settings, pair)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn what_the_core_stops_by_forecast_keeps_its_budget((guest, settings, pair) in anything()) {
        let run = run(&guest, settings, pair);
        let rest_of_link = pair.link_bytes_per_s;
        match &run.ending {
            Ending::Moved => {
                let report = run.report.as_ref().expect("it moved");
                let forced = report.forecast.upper_ms > report.downtime_budget_ms;
                prop_assert!(forced || report.downtime_ms <= report.downtime_budget_ms, "{:?}", report);
                prop_assert!(!forced || settings.on_timeout == OnTimeout::Stop && run.took >= settings.timeout);
                let standstill = s(run.standstill.expect("it was stopped")) * 1e3;
                prop_assert!(standstill <= report.downtime_ms + 1e-6, "the guest sees no more than the source");
            }
            Ending::Stayed { reason, timeout } => {
                prop_assert!(*timeout, "nothing else fails here: {}", reason);
                prop_assert!(run.took >= settings.timeout.min(run.took + MS));
            }
        }
        prop_assert!(s(run.took) * rest_of_link * 1.001 >= run.wire_bytes || run.report.is_none());
    }

    #[test]
    fn more_bandwidth_never_makes_it_slower((guest, settings, pair) in anything(), factor in 1.1f64..10.0) {
        // Round trips fit the budget here: a guest that can't be stopped whatever the bandwidth is another test's.
        let downtime_budget = settings.downtime_budget.max(300 * MS);
        let settings = Settings { timeout: Duration::from_secs(200), downtime_budget, ..settings };
        let guest = {
            // One that converges on the slower link, so that both end for the same reason.
            let sets = guest.sets.iter().map(|set| WorkingSet {
                pages_per_s: set.pages_per_s.min(pair.link_bytes_per_s / 4096.0 / 4.0), ..*set
            });
            GuestModel { sets: sets.collect(), ..guest }
        };
        let slow = run(&guest, settings, pair);
        let fast = run(&guest, settings, Pair { link_bytes_per_s: pair.link_bytes_per_s * factor, ..pair });
        prop_assert_eq!(&slow.ending, &fast.ending);
        // A faster link may be good for a round more, each of 10 ms at least.
        prop_assert!(s(fast.took) <= s(slow.took) * 1.02 + 0.15, "{:?} {:?}", slow.took, fast.took);
    }

    #[test]
    fn an_idle_guest_takes_its_bytes_over_the_rate_and_little_more(
        memory_mib in 16u64..16_384, link_bytes_per_s in 12.5e6f64..2e9
    ) {
        // The largest guest takes the slowest link 24 minutes.
        let settings = Settings { timeout: Duration::from_secs(3600), ..Settings::default() };
        let run = run(&GuestModel::idle(memory_mib * MIB, 1), settings, Pair { link_bytes_per_s, ..pair() });
        prop_assert_eq!(&run.ending, &Ending::Moved);
        let least = run.wire_bytes / link_bytes_per_s;
        prop_assert!(s(run.took) > least && s(run.took) < least * 1.0001 + 0.025, "{:?}, {} s", run.took, least);
        let pages_bytes = (memory_mib * MIB) as f64;
        prop_assert!((1.04..1.06).contains(&(run.wire_bytes / pages_bytes)), "{}", run.wire_bytes);
        prop_assert_eq!(run.rounds.len(), 2);
    }
}
