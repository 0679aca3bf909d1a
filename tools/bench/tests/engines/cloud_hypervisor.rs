//! Cloud Hypervisor, where it is installed.

use ferry_bench::engine::{Ending, EngineError, EngineReport, Pair};
use ferry_lab::LabClock;

use crate::world::{World, skip};

const DIRTYING: &str =
    "guest = 'dirty rate=20 set=16 fill=64 zero=25 text=50 random=25 verify=64'\nmemory_mib = 128";

fn world(test: &str, settings: &str, scenario: &str) -> Option<World> {
    World::new(test, &format!("kind = 'cloud-hypervisor'\n{settings}"), scenario)
}

fn check(world: &World, pair: &dyn Pair, report: &EngineReport) {
    assert_eq!(report.ending, Ending::Moved);
    assert!(report.done > report.ordered);
    assert!(report.downtime_ms.is_some());
    let flags = pair.flags().join("\n");
    for words in ["source: ", "--memory size=128M,thp=on", "target: ", "\"downtime_ms\":300"] {
        assert!(flags.contains(words), "{words} is missing: {flags}");
    }
    assert_eq!(world.scenario.memory_mib, 128);
}

fn check_rounds(report: &EngineReport) {
    let rounds = &report.rounds;
    assert!(rounds.len() >= 2, "{rounds:?}");
    assert_eq!(report.round_count, u32::try_from(rounds.len()).ok());
    assert!(rounds.iter().all(|round| round.from_ms.is_some()), "{rounds:?}");
    assert!(rounds.windows(2).all(|pair| pair[0].from_ms < pair[1].from_ms), "{rounds:?}");
    // What the guest had just dirtied.
    assert!(rounds[rounds.len() - 1].sent_pages.is_some_and(|pages| pages > 0), "{rounds:?}");
    assert!(report.forecast_ms.is_some());
    assert!(
        report.more.iter().any(|(name, mib)| name == "sent_memory_mib" && *mib > 16.0),
        "{:?}",
        report.more
    );
}

#[test]
fn pre_copy_moves_the_guest() {
    let Some(world) = world("pre_copy_moves_the_guest", "", DIRTYING) else { return };
    let mut pair = world.ready();
    let process = procfs::process::Process::new(i32::try_from(pair.source_pid()).unwrap()).unwrap();
    let names = process.tasks().unwrap().flatten().filter_map(|task| Some(task.stat().ok()?.comm));
    assert_eq!(names.filter(|name| pair.is_vcpu(name)).count(), 1);
    let before = world.until(pair.source_pid(), "live", |_| true);
    let report = pair.migrate(LabClock::start()).unwrap();
    check(&world, &*pair, &report);
    check_rounds(&report);
    world.goes_on(pair.target_pid(), &before);
}

#[test]
fn several_streams_are_connections() {
    let Some(world) = world("several_streams_are_connections", "streams = 3", DIRTYING) else { return };
    let (pair, report) = world.moved();
    check(&world, &*pair, &report);
    check_rounds(&report);
    assert!(pair.flags().join("\n").contains("\"connections\":3"));
}

#[test]
fn post_copy_runs_the_guest_at_the_target_first() {
    let test = "post_copy_runs_the_guest_at_the_target_first";
    let Some(world) = world(test, "strategy = 'post-copy'", DIRTYING) else { return };
    let mut pair = match world.start() {
        Err(EngineError::Unsupported { what, .. }) => return skip(test, &what),
        other => {
            drop(other.unwrap());
            world.ready()
        }
    };
    let before = world.until(pair.source_pid(), "live", |_| true);
    let report = pair.migrate(LabClock::start()).unwrap();
    check(&world, &*pair, &report);
    assert_eq!(report.rounds, []);
    world.goes_on(pair.target_pid(), &before);
}

#[test]
fn a_migration_that_does_not_converge_is_cancelled_and_the_guest_stays() {
    let test = "a_migration_that_does_not_converge_is_cancelled_and_the_guest_stays";
    let scenario = "guest = 'dirty rate=max set=64'\nmemory_mib = 128\ndowntime_ms = 1\ntimeout_s = 1\n\
                    link = { kind = 'tbf', rate_mbit_s = 200, queue_ms = 10 }";
    let Some(world) = world(test, "", scenario) else { return };
    let mut pair = world.ready();
    let report = pair.migrate(LabClock::start()).unwrap();
    assert_eq!(report.ending, Ending::NotConverged);
    assert!(report.done > report.ordered && report.downtime_ms.is_none(), "{report:?}");
    let after = world.until(pair.source_pid(), "stay", |_| true);
    world.goes_on(pair.source_pid(), &after);
}

#[test]
fn a_target_that_is_gone_is_a_failure_and_the_guest_stays() {
    let test = "a_target_that_is_gone_is_a_failure_and_the_guest_stays";
    let Some(world) = world(test, "", DIRTYING) else { return };
    let mut pair = world.ready();
    crate::world::end(pair.target_pid());
    match pair.migrate(LabClock::start()).unwrap().ending {
        Ending::Failed(why) => assert!(why.contains("source says"), "{why}"),
        other @ (Ending::Moved | Ending::NotConverged) => panic!("{other:?}"),
    }
    let after = world.until(pair.source_pid(), "stay", |_| true);
    world.goes_on(pair.source_pid(), &after);
}

#[test]
fn what_it_can_not_do_is_said_before_anything_starts() {
    let test = "what_it_can_not_do_is_said_before_anything_starts";
    for (settings, word) in [
        ("compression = 'zstd'", "packing"),
        ("strategy = 'auto-converge'", "vCPUs"),
        ("streams = 200", "128"),
    ] {
        let Some(world) = world(test, settings, DIRTYING) else { return };
        match world.start() {
            Err(EngineError::Unsupported { what, .. }) => assert!(what.contains(word), "{what}"),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it started"),
        }
    }
}
