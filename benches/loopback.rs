//! Migrations of a real guest over loopback, beside what loopback TCP takes in the same run.
//!
//! `cargo bench -p ferry-benches --bench loopback [-- runs=7 streams=1 mib=1024 compress=none]` interleaves one TCP
//! transfer (over as many connections) and one migration of a guest with so many MiB of random pages that is otherwise
//! idle, and prints medians with their spread. Nothing is asserted: machines are noisy, ratios within one run are what
//! counts.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use ferry_migrate::protocol::page::Compression;
use ferry_tests::guest::{Guest, boot, config, has_kvm, move_guest, runtime};
use ferry_vmm::{Backing, Machine, MachineConfig};

const MIB: u64 = 1 << 20;

/// What the command line asks for.
#[derive(Debug, Clone, Copy)]
struct Order {
    runs: u32,
    streams: u16,
    mib: u64,
    compression: Compression,
}

impl Order {
    fn of_command_line() -> Self {
        let value = |key: &str| {
            std::env::args()
                .find_map(|argument| argument.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
        };
        let number = |key, otherwise| {
            value(key).map_or(otherwise, |value| value.parse().expect("a number behind the '='"))
        };
        Self {
            runs: number("runs", 7),
            streams: u16::try_from(number("streams", 1)).expect("few streams"),
            mib: number("mib", 1024).into(),
            compression: value("compress")
                .map_or(Compression::None, |value| value.parse().expect("a packing")),
        }
    }

    fn guest(self) -> MachineConfig {
        config(self.mib + 64, 1, Backing::PrivateAnonymous)
    }
}

fn main() {
    // `cargo bench` passes --bench; `cargo test --benches` does not, and wants no measurement.
    if !std::env::args().any(|argument| argument == "--bench") || !has_kvm() {
        return;
    }
    let order = Order::of_command_line();
    let runtime = runtime();
    let Order { runs, streams, mib, compression } = order;
    println!(
        "{mib} MiB of random pages, idle guest, loopback, streams {streams}, packing {compression}; {runs} runs"
    );
    let mut guest = boot(&format!("fill mib={mib} random=100 verify=0"), &order.guest());
    // The first ones touch memory that the machine may not have used before.
    for _ in 0..2 {
        guest = runtime.block_on(move_guest(guest, |_| {})).0;
    }
    let (mut tcp, mut whole, mut round, mut ratio) = (vec![], vec![], vec![], vec![]);
    let (mut downtime, mut gap) = (vec![], vec![]);
    for _ in 0..runs {
        let raw = raw_tcp(order);
        warm(order);
        let seen = measure(&runtime, guest, order);
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
fn warm(order: Order) {
    let machine = Machine::build(&order.guest()).expect("a machine");
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

fn measure(runtime: &tokio::runtime::Runtime, guest: Guest, order: Order) -> Seen {
    let since = guest.healthy().heartbeat_tsc;
    let (guest, summary) = runtime.block_on(move_guest(guest, |options| {
        options.streams = order.streams;
        options.compression = order.compression;
    }));
    let report = guest.goes_on();
    let gap = report.largest_gap_since(since).map_or(0, |gap| gap.length_ticks);
    let first = &summary.rounds[0];
    Seen {
        guest,
        whole_mib_per_s: order.mib as f64 / summary.total.as_secs_f64(),
        round_mib_per_s: first.sent.wire_bytes as f64 / MIB as f64 / first.took.as_secs_f64(),
        downtime_ms: summary.downtime.total().as_secs_f64() * 1e3,
        gap_ms: report.gap_ms(gap).unwrap_or_default(),
    }
}

/// What as many loopback connections take: 1 MiB writes, receivers that discard.
#[expect(clippy::disallowed_methods, reason = "a bench measures real time")]
fn raw_tcp(order: Order) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let buffer: Vec<u8> = (0..1u32 << 20).map(|at| at.to_le_bytes()[0]).collect();
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..order.streams {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut buffer = vec![0; 1 << 20];
                while stream.read(&mut buffer).expect("bytes") > 0 {}
            });
            scope.spawn(|| {
                let mut stream = TcpStream::connect(address).expect("a connection");
                stream.set_nodelay(true).expect("no delay");
                for _ in 0..order.mib / u64::from(order.streams) {
                    stream.write_all(&buffer).expect("written");
                }
            });
        }
    });
    order.mib as f64 / began.elapsed().as_secs_f64()
}

fn show(what: &str, unit: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    println!("{what:<32} {:>9.2} {unit:<6} ({least:.2} to {most:.2})", values[values.len() / 2]);
}
