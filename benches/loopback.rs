//! Migrations of a real guest over loopback, beside what loopback TCP takes in the same run.
//!
//! `cargo bench -p ferry-benches --bench loopback [-- RUNS]` interleaves one TCP transfer and one migration, with
//! 1 GiB of random pages in an idle guest, one stream, no compression; and prints medians with their spread.
//! Nothing is asserted: machines are noisy, ratios within one run are what counts.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use ferry_tests::guest::{Guest, boot, config, has_kvm, move_guest};
use ferry_vmm::{Backing, Machine};

const MIB: u64 = 1 << 20;
const FILLED_MIB: u64 = 1024;
const GUEST_MIB: u64 = 1088;

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` does not, and wants no measurement.
    if !std::env::args().any(|argument| argument == "--bench") || !has_kvm() {
        return;
    }
    let runs = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(7);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    println!("{FILLED_MIB} MiB of random pages, idle guest, loopback, 1 stream, no compression; {runs} runs");
    let mut guest = boot(
        &format!("fill mib={FILLED_MIB} random=100 verify=0"),
        &config(GUEST_MIB, 1, Backing::PrivateAnonymous),
    );
    // The first ones touch memory that the machine may not have used before.
    for _ in 0..2 {
        guest = runtime.block_on(move_guest(guest, |_| {})).0;
    }
    let (mut tcp, mut whole, mut round, mut ratio) = (vec![], vec![], vec![], vec![]);
    let (mut downtime, mut gap) = (vec![], vec![]);
    for _ in 0..runs {
        let raw = raw_tcp(FILLED_MIB * MIB);
        warm();
        let seen = measure(&runtime, guest);
        guest = seen.guest;
        tcp.push(raw);
        whole.push(seen.whole_mib_per_s);
        round.push(seen.round_mib_per_s);
        ratio.push(seen.whole_mib_per_s / raw);
        downtime.push(seen.downtime_ms);
        gap.push(seen.gap_ms);
    }
    show("raw TCP", "MiB/s", tcp);
    show("migration, start to end", "MiB/s", whole);
    show("first round", "MiB/s", round);
    show("migration / raw TCP", "", ratio);
    show("downtime, as the source saw it", "ms", downtime);
    show("downtime, as the guest saw it", "ms", gap);
}

/// Touches as much memory as the target is about to take. On a virtual host the first touch of memory that was
/// idle for a while is a fault of the host below, which has nothing to do with the migration.
fn warm() {
    let machine = Machine::build(&config(GUEST_MIB, 1, Backing::PrivateAnonymous)).expect("a machine");
    let ram = machine.ram();
    ram.prefault(0, ram.page_count()).expect("memory");
}

struct Seen {
    guest: Guest,
    whole_mib_per_s: f64,
    round_mib_per_s: f64,
    downtime_ms: f64,
    gap_ms: f64,
}

fn measure(runtime: &tokio::runtime::Runtime, guest: Guest) -> Seen {
    let since = guest.healthy().heartbeat_tsc;
    let (guest, summary) = runtime.block_on(move_guest(guest, |_| {}));
    let report = guest.goes_on();
    let gap = report.largest_gap_since(since).map_or(0, |gap| gap.length_ticks);
    let wire_bytes: u64 = summary.rounds.iter().map(|round| round.sent.wire_bytes).sum();
    let first = &summary.rounds[0];
    Seen {
        guest,
        whole_mib_per_s: wire_bytes as f64 / MIB as f64 / summary.total.as_secs_f64(),
        round_mib_per_s: first.sent.wire_bytes as f64 / MIB as f64 / first.took.as_secs_f64(),
        downtime_ms: summary.downtime.total().as_secs_f64() * 1e3,
        gap_ms: report.gap_ms(gap).unwrap_or_default(),
    }
}

/// What one loopback connection takes: 1 MiB writes, a receiver that discards.
#[expect(clippy::disallowed_methods, reason = "a bench measures real time")]
fn raw_tcp(bytes: u64) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer).expect("bytes") > 0 {}
    });
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_nodelay(true).expect("no delay");
    let buffer: Vec<u8> = (0..1u32 << 20).map(|at| at.to_le_bytes()[0]).collect();
    let began = Instant::now();
    for _ in 0..bytes / MIB {
        stream.write_all(&buffer).expect("written");
    }
    drop(stream);
    reader.join().expect("a reader");
    bytes as f64 / MIB as f64 / began.elapsed().as_secs_f64()
}

fn show(what: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    println!("{what:<32} {:>9.2} {unit:<6} ({least:.2} to {most:.2})", values[values.len() / 2]);
}
