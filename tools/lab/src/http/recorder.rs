//! Collects what the connections of a load report, behind one lock that a snapshot can take.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::ByteMeter;
use super::report::{
    FAILURES_KEPT_MAX, Failure, FailureKind, GAP_LISTED_FROM_MS, HttpReport, HttpSnapshot, Latency,
    REQUESTS_KEPT_MAX, RequestRecord,
};
use crate::clock::LabClock;
use crate::timeline::{BUCKET_MS, Gap, GapTracker, Timeline};

/// How far a snapshot looks back for its throughput.
const SNAPSHOT_WINDOW_MS: u64 = 200;

#[derive(Debug)]
pub(crate) struct Recorder {
    clock: LabClock,
    records: Mutex<Records>,
}

#[derive(Debug)]
struct Records {
    start_us: u64,
    end_us: u64,
    ok: u64,
    failed: u64,
    bytes: u64,
    connections_opened: u64,
    failures_by_kind: BTreeMap<FailureKind, u64>,
    failures: Vec<Failure>,
    requests: Vec<RequestRecord>,
    timeline: Timeline,
    data_gaps: GapTracker,
    response_gaps: GapTracker,
    connection_gaps: Vec<GapTracker>,
}

impl Recorder {
    pub(crate) fn start(clock: LabClock, connections: usize) -> Self {
        let now_us = clock.now_us();
        let gaps = GapTracker::start(now_us, GAP_LISTED_FROM_MS);
        let records = Records {
            start_us: now_us,
            end_us: now_us,
            ok: 0,
            failed: 0,
            bytes: 0,
            connections_opened: 0,
            failures_by_kind: BTreeMap::new(),
            failures: Vec::new(),
            requests: Vec::new(),
            timeline: Timeline::default(),
            data_gaps: gaps.clone(),
            response_gaps: gaps.clone(),
            connection_gaps: vec![gaps; connections],
        };
        Self { clock, records: Mutex::new(records) }
    }

    pub(crate) fn now_us(&self) -> u64 {
        self.clock.now_us()
    }

    /// A meter for one new connection, which counts it as opened.
    pub(crate) fn meter(self: &Arc<Self>, connection: usize) -> ByteMeter {
        self.records().connections_opened += 1;
        let recorder = Arc::clone(self);
        ByteMeter::new(move |bytes| recorder.received(connection, bytes))
    }

    pub(crate) fn succeeded(&self, connection: usize, start_us: u64) {
        let end_us = self.now_us();
        let mut records = self.records();
        records.ok += 1;
        records.response_gaps.event(end_us);
        records.keep(RequestRecord { connection, start_us, end_us, ok: true });
    }

    pub(crate) fn failed(&self, connection: usize, start_us: u64, kind: FailureKind, detail: String) {
        let end_us = self.now_us();
        let mut records = self.records();
        records.failed += 1;
        *records.failures_by_kind.entry(kind).or_default() += 1;
        if records.failures.len() < FAILURES_KEPT_MAX {
            records.failures.push(Failure { at_ms: end_us as f64 / 1e3, connection, kind, detail });
        }
        records.keep(RequestRecord { connection, start_us, end_us, ok: false });
    }

    /// A connection asks no more. Its last request may have waited in vain until now.
    pub(crate) fn connection_ended(&self, connection: usize) {
        let now_us = self.now_us();
        self.records().connection_gaps[connection].event(now_us);
    }

    /// All connections have ended. The last requests may have waited in vain until now.
    pub(crate) fn finish(&self) {
        let now_us = self.now_us();
        let mut records = self.records();
        records.end_us = now_us;
        records.data_gaps.event(now_us);
        records.response_gaps.event(now_us);
    }

    pub(crate) fn snapshot(&self) -> HttpSnapshot {
        let now_us = self.now_us();
        let records = self.records();
        let window = usize::try_from(SNAPSHOT_WINDOW_MS / BUCKET_MS).unwrap_or(1);
        // The running bucket is not full yet.
        let end = usize::try_from(now_us / 1000 / BUCKET_MS).unwrap_or(usize::MAX);
        let begin = end.saturating_sub(window);
        let buckets = records.timeline.bytes.iter().skip(begin).take(end - begin);
        let mib = buckets.sum::<u64>() as f64 / f64::from(1 << 20);
        HttpSnapshot {
            ok: records.ok,
            failed: records.failed,
            bytes: records.bytes,
            mib_per_s: mib * 1e3 / SNAPSHOT_WINDOW_MS as f64,
            longest_data_gap: records.data_gaps.longest_at(now_us),
        }
    }

    pub(crate) fn report(&self) -> HttpReport {
        let records = self.records();
        let connection_gaps = records.connection_gaps.iter().map(GapTracker::longest);
        HttpReport {
            ok: records.ok,
            failed: records.failed,
            failures_by_kind: records.failures_by_kind.clone(),
            failures: records.failures.clone(),
            connections: records.connection_gaps.len(),
            connections_opened: records.connections_opened,
            bytes: records.bytes,
            start_ms: records.start_us as f64 / 1e3,
            end_ms: records.end_us as f64 / 1e3,
            longest_data_gap: records.data_gaps.longest(),
            data_gaps: records.data_gaps.listed().to_vec(),
            longest_response_gap: records.response_gaps.longest(),
            longest_connection_gap: connection_gaps
                .fold(Gap::default(), |a, b| if b.ms > a.ms { b } else { a }),
            latency: Latency::of(&records.requests),
            timeline: records.timeline.clone(),
            requests: records.requests.clone(),
        }
    }

    fn received(&self, connection: usize, bytes: u64) {
        let now_us = self.now_us();
        let mut records = self.records();
        records.bytes += bytes;
        records.timeline.add(now_us, bytes);
        records.data_gaps.event(now_us);
        records.connection_gaps[connection].event(now_us);
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().expect("nothing panics while it holds the lock")
    }
}

impl Records {
    fn keep(&mut self, request: RequestRecord) {
        if self.requests.len() < REQUESTS_KEPT_MAX {
            self.requests.push(request);
        }
    }
}
