//! Peers that mean harm to a waiting target, before anything is known of them and after: what they cost is bounded, and
//! somebody honest gets through meanwhile.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use ferry_migrate::protocol::message::{Describe, Hello, NetworkIdentity, State};
use ferry_migrate::protocol::negotiation::Features;
use ferry_migrate::protocol::{Epoch, Message, MigrationId, PAGE_BYTES, Region, VmId, wire};
use ferry_tests::process::{Host, Process, wait_until};
use socket2::{Domain, Socket, Type};

use crate::{FERRY, turn};

/// More than a target lets wait, from one address and in all.
const STRANGERS: usize = 150;

/// What a target may have open besides strangers: its own files.
const DESCRIPTORS_MAX: usize = 64;

/// How many strangers a target lets wait, from one address and in all.
const LET_IN: [usize; 2] = [64, 128];

/// How much a target may grow whatever a peer says: far more than it needs, far less than what is announced here.
const GROWTH_MAX_KIB: u64 = 64 << 10;

fn from(address: &str, target: &str) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&format!("{address}:0").parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.connect(&target.parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.into()
}

fn descriptors(process: &Process) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count()
}

/// The most memory that it ever had, in KiB.
fn peak_kib(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("every process has one");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn moves(source: &Host<'_>, target: &Host<'_>, address: &str) {
    source.ferry(&["migrate", "web", "--to", address, "--downtime", "2s", "--json"]).well();
    target.until_state("web", "running");
    target.goes_on("web");
}

#[test]
fn strangers_that_say_nothing_or_little_keep_nobody_out_and_are_sent_away() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    let (waiting, address) = target.receives();
    let before = descriptors(&waiting);
    let hello = wire::encode(&Message::Ping(1));
    let mut strangers: Vec<TcpStream> = (0..STRANGERS).map(|_| from("127.0.0.2", &address)).collect();
    // The beginning of a message each, never the rest.
    for (index, stranger) in strangers.iter_mut().enumerate() {
        // Those beyond the limit have been cut off already.
        let _ = stranger.write_all(&hello[..index % 8]);
    }
    // Those that have had to go for others go in a moment.
    let open = until_bounded(&waiting, LET_IN[0]);
    for stranger in &mut strangers {
        let _ = stranger.write_all(&hello[..1]);
    }
    moves(&source, &target, &address);
    // Nobody waits for the rest for ever.
    for stranger in &mut strangers {
        stranger.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let ended = stranger.read(&mut [0; 64]);
        let timed_out = matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "it is still let wait: {ended:?}");
    }
    wait_until("the strangers' descriptors", || {
        (descriptors(&waiting) < open.max(before + 64)).then_some(())
    });
}

fn until_bounded(waiting: &Process, strangers: usize) -> usize {
    wait_until("fewer descriptors", || {
        Some(descriptors(waiting)).filter(|&open| open <= DESCRIPTORS_MAX + strangers)
    })
}

#[test]
fn strangers_from_many_addresses_keep_nobody_out() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    let (waiting, address) = target.receives();
    let strangers: Vec<TcpStream> = (2..6)
        .flat_map(|host| (0..STRANGERS).map(move |_| format!("127.0.0.{host}")))
        .map(|from_there| from(&from_there, &address))
        .collect();
    until_bounded(&waiting, LET_IN[1]);
    // Long before any of them has run out of its time.
    moves(&source, &target, &address);
    drop(strangers);
}

/// A greeting that any target takes.
fn hello(attempt: u8) -> Message {
    Message::Hello(Hello {
        version_oldest: wire::VERSION_OLDEST,
        version_newest: wire::VERSION_NEWEST,
        features: Features::OURS,
        migration: MigrationId([attempt; 16]),
        vm: VmId([attempt; 16]),
        name: "web".parse().unwrap(),
        epoch: Epoch::FIRST,
        resumes: false,
    })
}

#[test]
fn a_source_that_sends_whatever_it_likes_does_not_fill_a_targets_memory() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    let (waiting, address) = target.receives();
    let before = peak_kib(&waiting);
    // A machine larger than any host, of which nothing else is right.
    let huge = Message::Describe(Describe {
        description: vec![0xa5; 200 << 10],
        regions: vec![Region { gpa: 0, bytes: (1 << 40) - u64::try_from(PAGE_BYTES).unwrap() }],
        streams: 64,
    });
    let state =
        Message::State(State { state: vec![1; 8 << 20], network: NetworkIdentity::default(), runs: true });
    let floods = [vec![huge], vec![state; 8], (0..200_000).map(Message::Ping).collect()];
    for (attempt, flood) in (1..).zip(floods) {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(&wire::encode(&hello(attempt))).unwrap();
        for message in &flood {
            // What it answers is not read. At some point it hangs up.
            if stream.write_all(&wire::encode(message)).is_err() {
                break;
            }
        }
        drop(stream);
        target.until_state("web", "waiting");
        let grown = peak_kib(&waiting).saturating_sub(before);
        assert!(grown < GROWTH_MAX_KIB, "flood {attempt}: {grown} KiB more than {before}");
    }
    // What is left of the last flood may still be being read.
    wait_until("somebody honest to get through", || {
        let said = source.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]);
        assert!(said.code == Some(0) || said.stderr.contains("is busy"), "{said:?}");
        (said.code == Some(0)).then_some(())
    });
    target.goes_on("web");
}
