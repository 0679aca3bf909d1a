//! Links that break in the middle of a migration of a real guest, and come back.

use std::time::Duration;

use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::{Failure, Outcome};
use ferry_vmm::Backing;
use tokio::sync::watch;

use ferry_tests::guest::{
    Guest, Held, boot, config, has_kvm, move_guest_through, one_at_a_time, runtime, source, target_for,
};
use ferry_tests::proxy::{Cuts, CuttingProxy};

const WORKLOAD: &str =
    "dirty rate=300 set=48 order=random write=page fill=100 zero=25 text=25 random=50 verify=500";

/// Moves the guest over a link that breaks `count` times, every `bytes_max` bytes.
fn move_over(guest: Guest, cuts: Cuts, streams: u16, compression: Compression) -> Guest {
    let (guest, summary) = runtime().block_on(move_guest_through(
        guest,
        |target| CuttingProxy::cutting(target, cuts).address,
        |options| {
            options.streams = streams;
            options.compression = compression;
            options.verify_whole = true;
        },
    ));
    guest.goes_on();
    let reconnections = &summary.reconnections;
    println!("{compression}, {streams} streams: {reconnections:?}");
    assert!(!reconnections.is_empty(), "the link did break");
    // What had arrived was not sent again: at most one cut's worth is lost each time.
    let sent: u64 = summary.rounds.iter().map(|round| round.sent.wire_bytes).sum();
    assert!(sent < (2 * 256) << 20, "{sent} bytes were sent");
    assert!(reconnections.iter().any(|again| again.arrived_pages > 0), "{reconnections:?}");
    guest
}

#[test]
fn a_link_that_breaks_again_and_again_does_not_cost_the_migration() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let mut guest = boot(WORKLOAD, &config(256, 1, Backing::PrivateAnonymous));
    let outage = Some(Duration::from_millis(300));
    for (streams, compression) in
        [(1, Compression::None), (3, Compression::None), (2, Compression::Lz4), (2, Compression::Auto)]
    {
        let bytes_max = if compression == Compression::None { 35 << 20 } else { 20 << 20 };
        guest = move_over(guest, Cuts { bytes_max, count: 3, outage }, streams, compression);
    }
}

#[test]
fn a_link_that_stays_broken_ends_the_attempt_and_the_next_one_succeeds() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot(WORKLOAD, &config(256, 1, Backing::PrivateAnonymous));
    let runtime = runtime();
    let mut held = None;
    for attempt in 0..3 {
        let failure = runtime.block_on(async {
            let mut target = target_for(&guest);
            let proxy = CuttingProxy::start(&target.address, 30 << 20);
            let mut options = guest.options(proxy.address);
            options.reconnect = Duration::from_secs(1);
            let (stop, cancel) = watch::channel(false);
            let moving = async {
                let outcome = source(&guest, options, watch::channel(false).1).await;
                // The target would keep what it has for a while longer.
                stop.send_replace(true);
                outcome
            };
            let (outcome, received) = tokio::join!(moving, target.receiver.receive(cancel));
            assert!(received.expect("threads").is_none());
            match outcome {
                Outcome::Stayed { failure, .. } => failure,
                Outcome::Moved(_) | Outcome::LetGo { .. } => panic!("it moved over a broken link"),
            }
        });
        assert!(matches!(&failure, Failure::Link(text) if text.contains("--reconnect")), "{failure}");
        guest.goes_on();
        if attempt == 0 {
            held = Some(Held::now());
        }
    }
    let (before, after) = (held.expect("set above"), Held::now());
    assert!(after.threads <= before.threads + 2, "threads were leaked: {before:?} {after:?}");
    let outage = Some(Duration::from_millis(100));
    move_over(guest, Cuts { bytes_max: 40 << 20, count: 1, outage }, 2, Compression::None);
}
