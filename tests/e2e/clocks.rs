//! The guest's clock over many migrations, by what the guest itself writes down.

use std::time::{Duration, SystemTime};

use ferry_vmm::Backing;

use ferry_tests::guest::{Guest, boot, config, has_kvm, move_guest, one_at_a_time};

const MIGRATIONS: u32 = 20;

/// What is allowed after all of them, beside the rate at which host clocks are adjusted (50 ppm of the time that passed).
const ERROR_MAX_NS: i128 = 1_000_000;

/// How far the guest's TSC is ahead of the host's wall clock, in ns. A heartbeat is a little old when it is read, never
/// early, so the freshest of many is closest.
#[expect(clippy::disallowed_methods, reason = "the host's wall clock is what the guest's is compared with")]
fn ahead_ns(guest: &Guest) -> i128 {
    let khz = i128::from(guest.machine.machine().tsc_khz().expect("a host with a stable TSC"));
    let sample = || {
        let report = guest.healthy();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        let now_ns = i128::try_from(now.as_nanos()).expect("before 2500");
        std::thread::sleep(Duration::from_micros(50));
        i128::from(report.heartbeat_tsc) * 1_000_000 / khz - now_ns
    };
    (0..2_000).map(|_| sample()).max().expect("samples")
}

#[test]
#[expect(clippy::disallowed_methods, reason = "how long the host's wall clock may have been adjusted")]
fn after_twenty_migrations_the_guests_clock_is_where_it_should_be() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let mut guest = boot("dirty rate=50 set=16", &config(128, 2, Backing::PrivateAnonymous));
    let began = SystemTime::now();
    let before = ahead_ns(&guest);
    let mut heartbeat = guest.healthy().heartbeat_tsc;
    for _ in 0..MIGRATIONS {
        guest = runtime.block_on(move_guest(guest, |_| {})).0;
        let now = guest.goes_on().heartbeat_tsc;
        assert!(now > heartbeat, "the guest's clock went back from {heartbeat} to {now}");
        heartbeat = now;
    }
    let error_ns = ahead_ns(&guest) - before;
    let passed = began.elapsed().expect("a clock that goes on");
    println!("{MIGRATIONS} migrations in {passed:?}: the guest's clock is {error_ns} ns off");
    let adjusted_ns = i128::try_from(passed.as_nanos() / 20_000).expect("a short test");
    assert!(error_ns.abs() <= ERROR_MAX_NS + adjusted_ns, "{error_ns} ns off after {passed:?}");
}
