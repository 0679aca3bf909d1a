//! QEMU: every strategy and packing that it has, and what happens when a migration comes to nothing.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use ferry_bench::engine::{Ending, EngineError, EngineReport, Pair};
use ferry_lab::LabClock;
use ferry_lab::network::lab::VM_IPV4;

use crate::world::World;

/// A guest that writes and checks itself, in memory that takes a moment to move.
const DIRTYING: &str =
    "guest = 'dirty rate=20 set=16 fill=64 zero=25 text=50 random=25 verify=64'\nmemory_mib = 128";

fn world(test: &str, settings: &str) -> Option<World> {
    World::new(test, &format!("kind = 'qemu'\n{settings}"), DIRTYING)
}

/// What every report of a guest that was moved has.
fn check(world: &World, pair: &dyn Pair, report: &EngineReport) -> BTreeMap<String, f64> {
    assert_eq!(report.ending, Ending::Moved);
    assert!(report.done > report.ordered);
    assert!(report.downtime_ms.is_some());
    // A quarter of what is filled is zero pages; packing makes text and deltas smaller, not random pages.
    assert!(report.wire_bytes.is_some_and(|bytes| bytes > 16 << 20), "{:?}", report.wire_bytes);
    let more: BTreeMap<_, _> = report.more.iter().cloned().collect();
    for name in
        ["total_own_ms", "setup_ms", "throughput_mbit_s", "zero_pages", "normal_pages", "stop_to_resume_ms"]
    {
        assert!(more.contains_key(name), "{name} is missing: {more:?}");
    }
    let count = report.round_count.unwrap();
    assert!(
        count >= 1 && report.rounds.len() == usize::try_from(count).unwrap(),
        "{count}: {:?}",
        report.rounds
    );
    let numbers: Vec<_> = report.rounds.iter().map(|round| round.round).collect();
    assert_eq!(numbers, (1..=count).collect::<Vec<_>>());
    let pages = u64::from(world.scenario.memory_mib) * 256;
    assert!(report.rounds[0].dirty_pages.is_some_and(|dirty| dirty >= pages));
    let sent: u64 = report.rounds.iter().filter_map(|round| round.sent_pages).sum();
    // Each round's number is rounded.
    assert!(sent + u64::from(count) >= pages, "{sent} pages were sent of {pages}: {:?}", report.rounds);
    assert!(report.dirty_pages.iter().any(|(_, left)| *left > 0.0));
    let flags = pair.flags().join("\n");
    for words in ["source: ", "microvm", "-incoming defer", "capabilities: ", "\"downtime-limit\":300"] {
        assert!(flags.contains(words), "{words} is missing: {flags}");
    }
    more
}

fn capabilities(pair: &dyn Pair) -> Vec<String> {
    let flags = pair.flags();
    let line = flags.iter().find_map(|line| line.strip_prefix("capabilities: ")).unwrap();
    line.split(' ').map(str::to_owned).collect()
}

#[test]
fn plain_pre_copy_moves_the_guest() {
    let Some(world) = world("plain_pre_copy_moves_the_guest", "") else { return };
    let (pair, report) = world.moved();
    check(&world, &*pair, &report);
    assert_eq!(capabilities(&*pair), ["events", "return-path"]);
    let threads =
        procfs::process::Process::new(i32::try_from(pair.source_pid()).unwrap()).unwrap().tasks().unwrap();
    let names = threads.flatten().filter_map(|task| Some(task.stat().ok()?.comm));
    assert_eq!(names.filter(|name| pair.is_vcpu(name)).count(), 1);
    assert!(!pair.is_vcpu("live_migration"));
}

#[test]
fn several_streams_are_multifd() {
    let Some(world) = world("several_streams_are_multifd", "streams = 3") else { return };
    let (pair, report) = world.moved();
    let more = check(&world, &*pair, &report);
    assert!(capabilities(&*pair).contains(&"multifd".to_owned()));
    assert!(more["multifd_bytes"] > 16e6, "{more:?}");
}

#[test]
fn zstd_packs() {
    let Some(world) = world("zstd_packs", "compression = 'zstd'") else { return };
    let (wire, _) = world.hosts.counters().unwrap();
    let before = wire.bytes().unwrap();
    let (pair, report) = world.moved();
    let bytes = wire.bytes().unwrap() - before;
    let more = check(&world, &*pair, &report);
    assert!(pair.flags().join(" ").contains("\"multifd-compression\":\"zstd\""));
    // By the interface's counter: QEMU 7.2 counts what it sends before it is packed.
    let plain = more["normal_pages"] * 4096.0;
    assert!(u32::try_from(bytes).is_ok_and(|bytes| f64::from(bytes) < 0.8 * plain), "{bytes} of {plain}");
}

#[test]
fn xbzrle_has_its_cache() {
    let Some(world) = world("xbzrle_has_its_cache", "compression = 'xbzrle'") else { return };
    let (pair, report) = world.moved();
    let more = check(&world, &*pair, &report);
    assert!(capabilities(&*pair).contains(&"xbzrle".to_owned()));
    assert_eq!(more["xbzrle_cache_bytes"], f64::from(64 << 20));
}

#[test]
fn auto_converge_slows_the_guest_down() {
    let test = "auto_converge_slows_the_guest_down";
    // However slow the guest gets, QEMU has to begin with it: this is written faster than it may be sent.
    let scenario = "guest = 'dirty rate=max set=64'\nmemory_mib = 128\nbandwidth_mbit_s = 800\ndowntime_ms = 50\n\
                    timeout_s = 8";
    let Some(world) = World::new(test, "kind = 'qemu'\nstrategy = 'auto-converge'", scenario) else { return };
    let mut pair = world.ready();
    assert!(capabilities(&*pair).contains(&"auto-converge".to_owned()));
    // Whether it converges is QEMU's affair.
    let report = pair.migrate(LabClock::start()).unwrap();
    let most = report.more.iter().find(|(name, _)| name == "throttle_percent_max");
    assert!(most.is_some_and(|(_, percent)| *percent > 0.0), "{report:?}");
}

#[test]
fn post_copy_runs_the_guest_at_the_target_first() {
    let test = "post_copy_runs_the_guest_at_the_target_first";
    // Slow enough, and dirtying enough, that one round can't be all.
    let scenario = "guest = 'dirty rate=max set=48 fill=48 verify=64'\nmemory_mib = 128\nbandwidth_mbit_s = 800\n\
                    downtime_ms = 300";
    let Some(world) = World::new(test, "kind = 'qemu'\nstrategy = 'post-copy'", scenario) else { return };
    let (pair, report) = match world.start() {
        Err(EngineError::Unsupported { what, .. }) if what.contains("refuses migrate-set-capabilities") => {
            return crate::world::skip(test, &what);
        }
        other => {
            drop(other.unwrap());
            world.moved()
        }
    };
    let more = check(&world, &*pair, &report);
    assert!(capabilities(&*pair).contains(&"postcopy-ram".to_owned()));
    assert!(more["postcopy_bytes"] > 0.0, "{more:?}");
}

#[test]
fn a_migration_that_does_not_converge_is_cancelled_and_the_guest_stays() {
    let test = "a_migration_that_does_not_converge_is_cancelled_and_the_guest_stays";
    let scenario = "guest = 'dirty rate=max set=64'\nmemory_mib = 128\nbandwidth_mbit_s = 100\ndowntime_ms = 10\n\
                    timeout_s = 1.5";
    let Some(world) = World::new(test, "kind = 'qemu'", scenario) else { return };
    let mut pair = world.ready();
    let report = pair.migrate(LabClock::start()).unwrap();
    assert_eq!(report.ending, Ending::NotConverged);
    assert!(report.wire_bytes.is_some_and(|bytes| bytes > 0) && !report.dirty_pages.is_empty(), "{report:?}");
    let after = world.until(pair.source_pid(), "stay", |_| true);
    let after = world.goes_on(pair.source_pid(), &after);
    // A cancelled migration sends nothing any more.
    let (wire, _) = world.hosts.counters().unwrap();
    let before = wire.bytes().unwrap();
    let second = after.tsc_khz * 1000;
    world.until(pair.source_pid(), "stay", |report| report.heartbeat_tsc > after.heartbeat_tsc + second);
    let sent = wire.bytes().unwrap() - before;
    assert!(sent < 64 << 10, "{sent} bytes were sent after it was cancelled");
}

#[test]
fn a_target_that_is_gone_is_a_failure_and_the_guest_stays() {
    let Some(world) = world("a_target_that_is_gone_is_a_failure_and_the_guest_stays", "") else { return };
    let mut pair = world.ready();
    crate::world::end(pair.target_pid());
    match pair.migrate(LabClock::start()).unwrap().ending {
        Ending::Failed(why) => assert!(why.contains("ocket") || why.contains("onnect"), "{why}"),
        other @ (Ending::Moved | Ending::NotConverged) => panic!("{other:?}"),
    }
    let after = world.until(pair.source_pid(), "stay", |_| true);
    world.goes_on(pair.source_pid(), &after);
}

#[test]
fn what_qemu_can_not_do_is_said_before_anything_starts() {
    let test = "what_qemu_can_not_do_is_said_before_anything_starts";
    let Some(world) = world(test, "compression = 'lz4'") else { return };
    match world.start() {
        Err(EngineError::Unsupported { engine, what }) => {
            assert_eq!(engine, "peer");
            assert!(what.contains("lz4"), "{what}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it started"),
    }
}

#[test]
fn a_kernel_that_is_none_is_quoted_with_qemus_words() {
    let Some(mut world) = world("a_kernel_that_is_none_is_quoted_with_qemus_words", "") else { return };
    world.use_kernel("/no/such/kernel".into());
    let error = world.start().err().unwrap().to_string();
    assert!(error.contains("source") && error.contains("/no/such/kernel"), "{error}");
}

#[test]
fn a_guest_with_a_network_serves_from_both_hosts() {
    let test = "a_guest_with_a_network_serves_from_both_hosts";
    let scenario = "guest = 'http fill=32 verify=64'\nmemory_mib = 128\nlink = { kind = 'veth' }";
    let Some(world) = World::new(test, "kind = 'qemu'", scenario) else { return };
    let mut pair = world.ready();
    let before = world.until(pair.source_pid(), "live", |_| true);
    assert!(serves(&world), "the guest does not serve from the source");
    let report = pair.migrate(LabClock::start()).unwrap();
    check(&world, &*pair, &report);
    world.goes_on(pair.target_pid(), &before);
    assert!(serves(&world), "the guest does not serve from the target");
}

/// Whether a client gets an answer.
fn serves(world: &World) -> bool {
    let client = world.hosts.client().unwrap();
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((VM_IPV4, 80))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(b"GET /file HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n")?;
        let mut head = [0; 15];
        stream.read_exact(&mut head)?;
        Ok(String::from_utf8_lossy(&head).into_owned())
    };
    let answer = client.run(ask).unwrap();
    answer.is_ok_and(|head| head == "HTTP/1.1 200 OK")
}
