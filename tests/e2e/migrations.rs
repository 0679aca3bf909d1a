//! Migrations that must succeed: back and forth, with every option, under every kind of load.

use std::time::Duration;

use ferry_migrate::BandwidthCap;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::report::MigrationReport;
use ferry_vmm::{Backing, MachineStatus};

use ferry_tests::guest::{Held, boot, config, has_kvm, move_guest, one_at_a_time, runtime};

#[test]
fn fifty_migrations_of_a_dirtying_guest_lose_nothing_and_leak_nothing() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let mut guest =
        boot("dirty rate=200 set=64 order=random write=page", &config(192, 1, Backing::PrivateAnonymous));
    let mut held = None;
    let mut downtimes = Vec::new();
    for number in 1..=50 {
        let (moved, summary) = runtime.block_on(move_guest(guest, |_| {}));
        guest = moved;
        let report = guest.goes_on();
        downtimes.push(summary.downtime.total().as_secs_f64() * 1e3);
        if number == 5 {
            // By then the runtime has all the threads it will ever have for this work.
            held = Some(Held::now());
        }
        assert!(report.pages_checked > 0, "the guest does check itself");
    }
    let (before, after) = (held.expect("set above"), Held::now());
    assert_eq!(before.files, after.files, "file descriptors were leaked");
    assert!(after.threads <= before.threads + 2, "threads were leaked: {before:?} {after:?}");
    assert!(after.mappings <= before.mappings + 40, "mappings were leaked: {before:?} {after:?}");
    let report = guest.healthy();
    assert_eq!(guest.epoch.number(), 51);
    downtimes.sort_by(f64::total_cmp);
    println!(
        "50 migrations: {} pages written, {} checked, 0 errors; downtime p50 {:.1} ms, max {:.1} ms",
        report.pages_written, report.pages_checked, downtimes[25], downtimes[49]
    );
}

#[test]
fn every_option_moves_a_guest() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let workload = "dirty rate=100 set=32 fill=100 zero=25 text=50 random=25 verify=500";
    for (backing, cpus) in [(Backing::PrivateAnonymous, 2), (Backing::SharedMemfd, 1)] {
        let mut guest = boot(workload, &config(256, cpus, backing));
        for (streams, compression) in [
            (1, Compression::None),
            (4, Compression::None),
            (1, Compression::Lz4),
            (3, Compression::Lz4),
            (1, Compression::Zstd(1)),
            (2, Compression::Zstd(3)),
            (2, Compression::Auto),
        ] {
            let (moved, summary) = runtime.block_on(move_guest(guest, |options| {
                options.streams = streams;
                options.compression = compression;
                options.adapt_streams = compression == Compression::Auto;
            }));
            guest = moved;
            guest.goes_on();
            let first = summary.rounds[0];
            let all = first.sent.pages() + first.sent.untouched_pages;
            assert_eq!(all, 256 * 256, "the first round has every page");
            let empty = first.sent.zero_pages + first.sent.untouched_pages;
            assert!(empty > 256 * 100, "most of this guest's memory is zero");
            let packed: u64 = summary.rounds.iter().map(|round| round.sent.packed_pages).sum();
            match compression {
                Compression::None => assert_eq!(packed, 0),
                Compression::Lz4 | Compression::Zstd(_) => assert!(packed > 0),
                // Goes by the link, so that on loopback anything may be right.
                Compression::Auto => {}
            }
        }
    }
}

#[test]
fn a_guest_with_memory_above_4_gib_moves() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    // 3 GiB lie below the hole, so the working set's end lies above 4 GiB.
    let guest = boot("dirty rate=300 set=3500", &config(3600, 1, Backing::PrivateAnonymous));
    while guest.healthy().passes < 1 {
        std::thread::sleep(Duration::from_millis(100));
    }
    let (guest, _) = runtime().block_on(move_guest(guest, |options| options.streams = 2));
    let passes = guest.healthy().passes;
    while guest.healthy().passes < passes + 1 {
        std::thread::sleep(Duration::from_millis(100));
    }
    guest.goes_on();
}

#[test]
fn a_paused_guest_arrives_paused_and_runs_when_resumed() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("dirty rate=50 set=16", &config(128, 1, Backing::PrivateAnonymous));
    guest.machine.machine().pause().expect("paused");
    let count = guest.healthy().heartbeat_count;
    let (guest, _) = runtime().block_on(move_guest(guest, |_| {}));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.healthy().heartbeat_count, count, "nobody resumed it");
    assert!(!matches!(guest.machine.machine().status(), MachineStatus::Running));
    // Once more without having run here.
    let (guest, _) = runtime().block_on(move_guest(guest, |_| {}));
    assert_eq!(guest.healthy().heartbeat_count, count, "nobody resumed it");
    guest.machine.machine().run().expect("resumed");
    guest.goes_on();
    let (guest, _) = runtime().block_on(move_guest(guest, |_| {}));
    guest.goes_on();
}

#[test]
fn a_bandwidth_cap_is_kept() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("fill mib=64 random=100", &config(128, 1, Backing::PrivateAnonymous));
    let cap = 50 << 20;
    let (guest, summary) =
        runtime().block_on(move_guest(guest, |options| options.bandwidth = BandwidthCap::new(Some(cap))));
    guest.goes_on();
    let round = summary.rounds[0];
    // A cap is a promise in one direction only: it may be slower, it must not be faster.
    let least = Duration::from_secs_f64(round.sent.wire_bytes as f64 / cap as f64 * 0.97 - 0.01);
    assert!(round.took >= least, "{} bytes in {:?}", round.sent.wire_bytes, round.took);
}

#[test]
fn a_migration_without_digests_says_so() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("dirty rate=50 set=16", &config(128, 1, Backing::PrivateAnonymous));
    let (guest, summary) = runtime().block_on(move_guest(guest, |options| options.verify = false));
    guest.goes_on();
    assert!(!summary.verified);
    let report = MigrationReport::new("guest", Duration::from_secs(1), &summary);
    assert_eq!((report.verified, report.digest, report.digest_equal), (false, None, None));
    let (guest, summary) = runtime().block_on(move_guest(guest, |_| {}));
    guest.goes_on();
    let report = MigrationReport::new("guest", Duration::from_secs(1), &summary);
    assert_eq!((report.verified, report.digest_equal), (true, Some(true)));
}
