//! A UDP echo probe: one datagram a millisecond, each with its number, and who came back when.
//!
//! One thread sends on time and one receives, so that neither waits for the other. A datagram that
//! the kernel refuses to send (no route, no neighbour yet) counts as sent and lost: to the one who
//! waits for the answer it is the same.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;

use super::ProbeError;
use crate::clock::LabClock;
use crate::namespace::Namespace;
use crate::timeline::{Gap, GapTracker};

/// How often a datagram is sent.
pub const INTERVAL: Duration = Duration::from_millis(1);

/// How long the last datagrams may take to come back once the probe is stopped.
pub const DRAIN: Duration = Duration::from_millis(500);

/// The most datagrams of one probe: half an hour's. After that it sends no more.
pub const DATAGRAMS_MAX: usize = 1_800_000;

/// Gaps between replies from here on are listed.
const GAP_LISTED_FROM_MS: f64 = 5.0;

/// How often the receiving thread looks whether it is to end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(20);

/// A datagram's number, little-endian, padded to the size of a small game or voice packet.
const DATAGRAM_BYTES: usize = 64;

const NUMBER_BYTES: usize = 8;

/// What a UDP probe saw.
#[derive(Debug, Clone, Serialize)]
pub struct UdpReport {
    /// Datagrams sent, those included that the kernel refused.
    pub sent: u64,
    /// Datagrams that came back.
    pub received: u64,
    /// Datagrams that did not.
    pub lost: u64,
    /// Copies that came back beyond the first.
    pub duplicates: u64,
    /// Datagrams that came back after one that was sent later.
    pub reordered: u64,
    /// Datagrams that the kernel refused to send; they are among the lost.
    pub refused: u64,
    /// The longest time without a reply, in milliseconds.
    pub longest_gap: Gap,
    /// Gaps between replies of 5 ms and more, in order of time.
    pub gaps: Vec<Gap>,
    /// The longest time in which the probe itself did not send: that much of a gap may be its own.
    pub longest_send_gap: Gap,
    /// The median round trip, in milliseconds.
    pub round_trip_p50_ms: f64,
    /// The longest round trip, in milliseconds.
    pub round_trip_max_ms: f64,
    /// The first and the last number of each run of lost datagrams, with the time the first was sent.
    pub losses: Vec<LostRun>,
}

/// A run of datagrams that did not come back.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LostRun {
    /// When the first was sent, in milliseconds since the clock's origin.
    pub at_ms: f64,
    /// How many in a row.
    pub count: u64,
}

/// A running UDP probe. Dropping it ends it.
#[derive(Debug)]
pub struct UdpProbe {
    shared: Arc<Shared>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    clock: LabClock,
    socket: UdpSocket,
    sending: AtomicBool,
    receiving: AtomicBool,
    records: Mutex<Records>,
}

#[derive(Debug)]
struct Records {
    sent_us: Vec<u64>,
    round_trip_us: Vec<Option<u64>>,
    received: u64,
    duplicates: u64,
    reordered: u64,
    refused: u64,
    highest: Option<usize>,
    gaps: GapTracker,
    send_gaps: GapTracker,
}

impl UdpProbe {
    /// Starts sending to the echo service at `target` from inside `namespace`.
    ///
    /// # Errors
    /// [`ProbeError`] if the socket or a thread could not be made. A target that does not answer is
    /// no error here: it shows in the report.
    pub fn start(namespace: &Namespace, clock: LabClock, target: SocketAddr) -> Result<Self, ProbeError> {
        let any: IpAddr =
            if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = namespace
            .run(|| {
                let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
                socket.connect(target)?;
                socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
                Ok(socket)
            })?
            .map_err(|source: io::Error| ProbeError::Socket { target, source })?;
        let gaps = GapTracker::start(clock.now_us(), GAP_LISTED_FROM_MS);
        let records = Records {
            sent_us: Vec::new(),
            round_trip_us: Vec::new(),
            received: 0,
            duplicates: 0,
            reordered: 0,
            refused: 0,
            highest: None,
            gaps: gaps.clone(),
            send_gaps: gaps,
        };
        let shared = Arc::new(Shared {
            clock,
            socket,
            sending: AtomicBool::new(true),
            receiving: AtomicBool::new(true),
            records: Mutex::new(records),
        });
        let mut probe = Self { shared, sender: None, receiver: None };
        let shared = Arc::clone(&probe.shared);
        probe.receiver = Some(namespace.start_thread("udp-receive", move || shared.receive())?);
        let shared = Arc::clone(&probe.shared);
        probe.sender = Some(namespace.start_thread("udp-send", move || shared.send())?);
        Ok(probe)
    }

    /// Replies so far, and the longest time without one, the present included.
    #[must_use]
    pub fn snapshot(&self) -> (u64, Gap) {
        let now_us = self.shared.clock.now_us();
        let records = self.shared.records();
        (records.received, records.gaps.longest_at(now_us))
    }

    /// Stops sending, waits for at most [`DRAIN`] for what is under way, and reports.
    #[must_use]
    pub fn stop(mut self) -> UdpReport {
        self.shared.sending.store(false, Ordering::Relaxed);
        join(self.sender.take());
        let end = self.shared.clock.now() + DRAIN;
        while self.shared.clock.now() < end && !self.shared.records().all_back() {
            thread::sleep(INTERVAL);
        }
        self.end();
        let mut records = self.shared.records();
        // Silence counts up to the last time that something was sent: after that none is owed.
        if let Some(last_sent_us) = records.sent_us.last().copied() {
            records.gaps.event(last_sent_us);
        }
        records.report()
    }

    fn end(&mut self) {
        self.shared.sending.store(false, Ordering::Relaxed);
        self.shared.receiving.store(false, Ordering::Relaxed);
        join(self.sender.take());
        join(self.receiver.take());
    }
}

impl Drop for UdpProbe {
    fn drop(&mut self) {
        self.end();
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread
        && let Err(panic) = thread.join()
        && !thread::panicking()
    {
        std::panic::resume_unwind(panic);
    }
}

impl Shared {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("nothing panics while it holds the lock")
    }

    fn send(&self) {
        let mut due = self.clock.now();
        while self.sending.load(Ordering::Relaxed) {
            let number = {
                let now_us = self.clock.now_us();
                let mut records = self.records();
                if records.sent_us.len() >= DATAGRAMS_MAX {
                    return;
                }
                records.sent_us.push(now_us);
                records.round_trip_us.push(None);
                records.send_gaps.event(now_us);
                records.sent_us.len() - 1
            };
            let mut datagram = [0; DATAGRAM_BYTES];
            datagram[..NUMBER_BYTES].copy_from_slice(&(number as u64).to_le_bytes());
            if self.socket.send(&datagram).is_err() {
                self.records().refused += 1;
            }
            // Whatever was missed by being late stays missed: a burst would probe nothing.
            due = (due + INTERVAL).max(self.clock.now());
            thread::sleep(due.saturating_sub(self.clock.now()));
        }
    }

    fn receive(&self) {
        let mut datagram = [0; DATAGRAM_BYTES];
        while self.receiving.load(Ordering::Relaxed) {
            // Errors are a timeout, or an ICMP message about a datagram that counts as lost anyway.
            let Ok(length) = self.socket.recv(&mut datagram) else { continue };
            let now_us = self.clock.now_us();
            if let Some(number) = datagram[..length].first_chunk::<NUMBER_BYTES>() {
                self.records().came_back(u64::from_le_bytes(*number), now_us);
            }
        }
    }
}

impl Records {
    fn came_back(&mut self, number: u64, now_us: u64) {
        let Ok(index) = usize::try_from(number) else { return };
        // A number that was never sent is not ours.
        let Some(round_trip) = self.round_trip_us.get_mut(index) else { return };
        if round_trip.is_some() {
            self.duplicates += 1;
            return;
        }
        *round_trip = Some(now_us.saturating_sub(self.sent_us[index]));
        self.received += 1;
        self.gaps.event(now_us);
        if self.highest.is_some_and(|highest| highest > index) {
            self.reordered += 1;
        }
        self.highest = self.highest.max(Some(index));
    }

    fn all_back(&self) -> bool {
        self.received == self.sent_us.len() as u64
    }

    fn report(&self) -> UdpReport {
        let sent = self.sent_us.len() as u64;
        let mut round_trips_us: Vec<u64> = self.round_trip_us.iter().copied().flatten().collect();
        round_trips_us.sort_unstable();
        let median_us = round_trips_us.get(round_trips_us.len() / 2).copied().unwrap_or(0);
        UdpReport {
            sent,
            received: self.received,
            lost: sent - self.received,
            duplicates: self.duplicates,
            reordered: self.reordered,
            refused: self.refused,
            longest_gap: self.gaps.longest(),
            gaps: self.gaps.listed().to_vec(),
            longest_send_gap: self.send_gaps.longest(),
            round_trip_p50_ms: median_us as f64 / 1e3,
            round_trip_max_ms: round_trips_us.last().copied().unwrap_or(0) as f64 / 1e3,
            losses: self.losses(),
        }
    }

    fn losses(&self) -> Vec<LostRun> {
        let mut runs: Vec<LostRun> = Vec::new();
        let mut in_run = false;
        for (sent_us, round_trip) in self.sent_us.iter().zip(&self.round_trip_us) {
            match (round_trip, runs.last_mut()) {
                (Some(_), _) => in_run = false,
                (None, Some(run)) if in_run => run.count += 1,
                (None, _) => {
                    in_run = true;
                    runs.push(LostRun { at_ms: *sent_us as f64 / 1e3, count: 1 });
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(sent: u64) -> Records {
        let gaps = GapTracker::start(0, GAP_LISTED_FROM_MS);
        Records {
            sent_us: (0..sent).map(|number| number * 1000).collect(),
            round_trip_us: (0..sent).map(|_| None).collect(),
            received: 0,
            duplicates: 0,
            reordered: 0,
            refused: 0,
            highest: None,
            gaps: gaps.clone(),
            send_gaps: gaps,
        }
    }

    #[test]
    fn losses_duplicates_and_reordering_are_told_apart() {
        let mut records = records(8);
        for (number, at_us) in [(0, 500), (3, 3500), (2, 3600), (3, 3700), (7, 9500), (99, 9600)] {
            records.came_back(number, at_us);
        }
        let report = records.report();
        assert_eq!((report.sent, report.received, report.lost), (8, 4, 4));
        assert_eq!((report.duplicates, report.reordered), (1, 1));
        assert_eq!(report.losses, [LostRun { at_ms: 1.0, count: 1 }, LostRun { at_ms: 4.0, count: 3 }]);
        assert_eq!(report.longest_gap, Gap { from_ms: 3.6, ms: 5.9 });
        assert!((report.round_trip_max_ms - 2.5).abs() < 1e-9, "{report:?}");
    }
}
