//! What a load found out, in types that can be written as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::timeline::{Gap, Timeline};

/// The most failures that are kept in full; all are counted.
pub const FAILURES_KEPT_MAX: usize = 100;

/// The most requests that are kept; all are counted.
pub const REQUESTS_KEPT_MAX: usize = 2_000_000;

/// Silences from this many milliseconds on are listed; shorter ones only count for the longest.
pub const GAP_LISTED_FROM_MS: f64 = 10.0;

/// In what way a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No connection could be made.
    Connect,
    /// The connection broke: it was reset or closed before the answer was complete.
    Broken,
    /// The answer was not complete in time.
    Timeout,
    /// The status was not 200.
    Status,
    /// The body had the wrong length.
    Length,
    /// The body had the wrong bytes.
    Content,
    /// The request itself could not be made.
    Request,
}

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failure {
    /// When it failed, in milliseconds since the clock's origin.
    pub at_ms: f64,
    /// The connection's number, counted from zero.
    pub connection: usize,
    /// In what way it failed.
    pub kind: FailureKind,
    /// The same in words.
    pub detail: String,
}

/// A request that ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RequestRecord {
    /// The connection's number, counted from zero.
    pub connection: usize,
    /// When it began, in microseconds since the clock's origin.
    pub start_us: u64,
    /// When it ended.
    pub end_us: u64,
    /// Whether the answer was right.
    pub ok: bool,
}

/// How long requests took, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 in 100 took no longer.
    pub p99_ms: f64,
    /// None took longer.
    pub max_ms: f64,
}

impl Latency {
    /// Of the right answers in `requests`; zeros if there are none.
    #[must_use]
    pub fn of(requests: &[RequestRecord]) -> Self {
        let right = requests.iter().filter(|request| request.ok);
        let mut durations_us: Vec<u64> =
            right.map(|request| request.end_us.saturating_sub(request.start_us)).collect();
        durations_us.sort_unstable();
        let at_percent = |percent: usize| {
            let rank = (durations_us.len() * percent).div_ceil(100).max(1) - 1;
            durations_us.get(rank).map_or(0.0, |us| *us as f64 / 1e3)
        };
        Self { p50_ms: at_percent(50), p99_ms: at_percent(99), max_ms: at_percent(100) }
    }
}

/// Counts of a load that runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HttpSnapshot {
    /// Right answers so far.
    pub ok: u64,
    /// Failures so far.
    pub failed: u64,
    /// Bytes received so far, headers included.
    pub bytes: u64,
    /// The throughput of the last 200 ms, in MiB/s.
    pub mib_per_s: f64,
    /// The longest silence so far on all connections together, the present one included.
    pub longest_data_gap: Gap,
}

/// All that a load recorded.
#[derive(Debug, Clone, Serialize)]
pub struct HttpReport {
    /// Right answers.
    pub ok: u64,
    /// Failures of any kind.
    pub failed: u64,
    /// Failures by kind.
    pub failures_by_kind: BTreeMap<FailureKind, u64>,
    /// The first failures, at most [`FAILURES_KEPT_MAX`].
    pub failures: Vec<Failure>,
    /// Connections kept busy at a time.
    pub connections: usize,
    /// Connections made in all; more than `connections` means that some were made anew.
    pub connections_opened: u64,
    /// Bytes received, headers included.
    pub bytes: u64,
    /// When the load began, in milliseconds since the clock's origin.
    pub start_ms: f64,
    /// When its last request ended.
    pub end_ms: f64,
    /// The longest time in which no connection received anything.
    pub longest_data_gap: Gap,
    /// All such times of at least [`GAP_LISTED_FROM_MS`], at most
    /// [`GAPS_LISTED_MAX`](crate::timeline::GAPS_LISTED_MAX).
    pub data_gaps: Vec<Gap>,
    /// The longest time in which no request was completed.
    pub longest_response_gap: Gap,
    /// The longest time in which some one connection received nothing.
    pub longest_connection_gap: Gap,
    /// How long requests took.
    pub latency: Latency,
    /// Bytes over time.
    pub timeline: Timeline,
    /// The first requests, at most [`REQUESTS_KEPT_MAX`].
    #[serde(skip)]
    pub requests: Vec<RequestRecord>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(took_us: u64, ok: bool) -> RequestRecord {
        RequestRecord { connection: 0, start_us: 10, end_us: 10 + took_us, ok }
    }

    #[test]
    fn latency_is_by_rank_and_of_right_answers_only() {
        let mut requests: Vec<_> = (1..=100).rev().map(|ms| request(ms * 1000, true)).collect();
        requests.push(request(10_000_000, false));
        assert_eq!(Latency::of(&requests), Latency { p50_ms: 50.0, p99_ms: 99.0, max_ms: 100.0 });
        assert_eq!(Latency::of(&[]), Latency::default());
        assert_eq!(Latency::of(&[request(7000, true)]), Latency { p50_ms: 7.0, p99_ms: 7.0, max_ms: 7.0 });
    }
}
