//! What QEMU says of a migration while it is under way, turned into a report.
//!
//! QEMU tells the moment at which a round begins (`MIGRATION_PASS`), but not what it sent in it. That is taken from
//! looks at `query-migrate` every few milliseconds, by interpolation between the looks around that moment.

use std::time::{Duration, SystemTime};

use ferry_lab::LabClock;
use serde_json::Value;

use super::qmp::Event;
use crate::engine::{EngineReport, whole};
use crate::results::Round;

/// By how much QEMU's wall clock may differ from ours before the moment of an event's arrival is taken instead.
const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(1);

/// The size of a page where QEMU does not tell, bytes.
const PAGE_BYTES: f64 = 4096.0;

/// Figures that only QEMU has: where they stand in `query-migrate`, and what they are called here.
const MORE: [(&str, &str); 19] = [
    ("/total-time", "total_own_ms"),
    ("/setup-time", "setup_ms"),
    ("/ram/mbps", "throughput_mbit_s"),
    ("/ram/pages-per-second", "pages_per_s"),
    ("/ram/duplicate", "zero_pages"),
    ("/ram/normal", "normal_pages"),
    ("/ram/dirty-pages-rate", "dirty_pages_per_s"),
    ("/ram/precopy-bytes", "precopy_bytes"),
    ("/ram/downtime-bytes", "downtime_bytes"),
    ("/ram/postcopy-bytes", "postcopy_bytes"),
    ("/ram/postcopy-requests", "postcopy_requests"),
    ("/ram/multifd-bytes", "multifd_bytes"),
    ("/xbzrle-cache/cache-size", "xbzrle_cache_bytes"),
    ("/xbzrle-cache/pages", "xbzrle_pages"),
    ("/xbzrle-cache/bytes", "xbzrle_bytes"),
    ("/xbzrle-cache/cache-miss", "xbzrle_cache_misses"),
    ("/xbzrle-cache/cache-miss-rate", "xbzrle_cache_miss_rate"),
    ("/xbzrle-cache/encoding-rate", "xbzrle_encoding_rate"),
    ("/xbzrle-cache/overflow", "xbzrle_overflows"),
];

/// How far a migration is, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// It is being set up, switched over or cancelled.
    UnderWay,
    /// Rounds over memory.
    Active,
    /// The guest runs at the target, which fetches what is missing.
    PostCopy,
    /// All is at the target.
    Completed,
    /// It was given up on request.
    Cancelled,
    /// It failed, or the link was lost in post-copy.
    Failed,
}

impl Status {
    /// What the word of `query-migrate` and of the event `MIGRATION` means. Words of later versions are taken for
    /// states on the way.
    #[must_use]
    pub(super) fn of(word: &str) -> Self {
        match word {
            "active" => Self::Active,
            "postcopy-active" => Self::PostCopy,
            "completed" => Self::Completed,
            "cancelled" => Self::Cancelled,
            "failed" | "postcopy-paused" => Self::Failed,
            _ => Self::UnderWay,
        }
    }
}

/// One look at `query-migrate`.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Duration,
    sent_pages: f64,
    wire_bytes: f64,
    left_pages: f64,
}

/// A migration as it has been seen so far.
#[derive(Debug)]
pub(super) struct Progress {
    clock: LabClock,
    ordered: Duration,
    looks: Vec<Look>,
    /// When each pass over memory began, with its number.
    passes: Vec<(u32, Duration)>,
    stopped: Option<SystemTime>,
    resumed: Option<SystemTime>,
    forecast_ms: Option<f64>,
    throttle_percent_max: Option<f64>,
    total_pages: Option<f64>,
    /// The last answer that had figures: QEMU forgets them when it gives up.
    figures: Value,
}

impl Progress {
    /// A migration that was ordered at `ordered`.
    #[must_use]
    pub(super) fn new(clock: LabClock, ordered: Duration) -> Self {
        Self {
            clock,
            ordered,
            looks: Vec::new(),
            passes: Vec::new(),
            stopped: None,
            resumed: None,
            forecast_ms: None,
            throttle_percent_max: None,
            total_pages: None,
            figures: Value::Null,
        }
    }

    /// Takes an event of the source; whether it makes a look worth while.
    pub(super) fn source_event(&mut self, event: &Event, arrived: Duration) -> bool {
        match event.name.as_str() {
            "MIGRATION_PASS" => {
                let pass = event.data.get("pass").and_then(Value::as_u64).unwrap_or_default();
                self.passes.push((u32::try_from(pass).unwrap_or(u32::MAX), self.moment(event, arrived)));
                true
            }
            "STOP" => {
                self.stopped = event.at;
                false
            }
            "MIGRATION" => true,
            _ => false,
        }
    }

    /// Notes when the target's guest resumed, by QEMU's clock.
    pub(super) fn target_resumed(&mut self, at: Option<SystemTime>) {
        self.resumed = at;
    }

    /// The number of passes over memory that have begun.
    #[must_use]
    pub(super) fn passes(&self) -> u32 {
        self.passes.last().map_or(0, |(pass, _)| *pass)
    }

    /// Takes the answer of `query-migrate`; how far it is.
    pub(super) fn look(&mut self, info: &Value, at: Duration) -> Status {
        let status = Status::of(info.get("status").and_then(Value::as_str).unwrap_or_default());
        let page_bytes = number(info, "/ram/page-size").filter(|bytes| *bytes > 0.0).unwrap_or(PAGE_BYTES);
        if let Some(wire_bytes) = number(info, "/ram/transferred") {
            let sent = ["/ram/normal", "/ram/duplicate", "/xbzrle-cache/pages"];
            self.looks.push(Look {
                at,
                sent_pages: sent.iter().filter_map(|name| number(info, name)).sum(),
                wire_bytes,
                left_pages: number(info, "/ram/remaining").unwrap_or_default() / page_bytes,
            });
            self.figures.clone_from(info);
            self.total_pages = number(info, "/ram/total").map(|bytes| bytes / page_bytes);
        }
        // Before the guest has been seen writing, the forecast is only the limit that was set.
        if status == Status::Active && number(info, "/ram/dirty-pages-rate").is_some_and(|rate| rate > 0.0) {
            self.forecast_ms = number(info, "/expected-downtime").or(self.forecast_ms);
        }
        if let Some(percent) = number(info, "/cpu-throttle-percentage") {
            self.throttle_percent_max = Some(self.throttle_percent_max.unwrap_or_default().max(percent));
        }
        status
    }

    /// Everything that QEMU told of a migration that was done at `done`.
    #[must_use]
    pub(super) fn report(&self, done: Duration) -> EngineReport {
        let info = &self.figures;
        let mut more: Vec<(String, f64)> = MORE
            .iter()
            .filter_map(|(place, name)| Some(((*name).to_owned(), number(info, place)?)))
            .collect();
        let stop_to_resume =
            self.stopped.zip(self.resumed).and_then(|(from, to)| to.duration_since(from).ok());
        more.extend(stop_to_resume.map(|time| ("stop_to_resume_ms".to_owned(), ms(time))));
        more.extend(self.throttle_percent_max.map(|most| ("throttle_percent_max".to_owned(), most)));
        let round_count = number(info, "/ram/dirty-sync-count").map(whole);
        EngineReport {
            ordered: self.ordered,
            done,
            downtime_ms: number(info, "/downtime"),
            forecast_ms: self.forecast_ms,
            wire_bytes: number(info, "/ram/transferred").map(whole),
            rounds: self.rounds(done),
            round_count: round_count.and_then(|count| u32::try_from(count).ok()),
            dirty_pages: self.looks.iter().map(|look| (self.since_order(look.at), look.left_pages)).collect(),
            more,
            ..EngineReport::default()
        }
    }

    fn rounds(&self, done: Duration) -> Vec<Round> {
        let ends = self.passes.iter().skip(1).map(|(_, begin)| *begin).chain([done]);
        let rounds = self.passes.iter().zip(ends).enumerate();
        rounds.map(|(index, ((pass, from), to))| self.round(index == 0, *pass, *from, to)).collect()
    }

    fn round(&self, is_first: bool, pass: u32, from: Duration, to: Duration) -> Round {
        let (pages_before, bytes_before) = self.sent_until(from);
        let (pages_after, bytes_after) = self.sent_until(to);
        let within = self.looks.iter().find(|look| look.at >= from && look.at < to);
        let dirty = if is_first {
            self.total_pages
        } else {
            within.map(|look| look.left_pages + look.sent_pages - pages_before)
        };
        Round {
            round: pass,
            from_ms: Some(self.since_order(from)),
            ms: Some(ms(to.saturating_sub(from))),
            dirty_pages: dirty.map(whole),
            sent_pages: Some(whole(pages_after - pages_before)),
            wire_bytes: Some(whole(bytes_after - bytes_before)),
            forecast_upper_ms: None,
        }
    }

    /// Pages and bytes sent until `at`.
    fn sent_until(&self, at: Duration) -> (f64, f64) {
        let begin = self.passes.first().map_or(self.ordered, |(_, begin)| *begin);
        let nothing = Look { at: begin, sent_pages: 0.0, wire_bytes: 0.0, left_pages: 0.0 };
        let before = self.looks.iter().rev().find(|look| look.at <= at).unwrap_or(&nothing);
        let Some(after) = self.looks.iter().find(|look| look.at > at) else {
            return (before.sent_pages, before.wire_bytes);
        };
        let span = after.at.saturating_sub(before.at).as_secs_f64();
        let share = if span > 0.0 { at.saturating_sub(before.at).as_secs_f64() / span } else { 1.0 };
        let between = |before: f64, after: f64| before + (after - before) * share;
        (between(before.sent_pages, after.sent_pages), between(before.wire_bytes, after.wire_bytes))
    }

    /// When an event happened, on the lab's clock.
    fn moment(&self, event: &Event, arrived: Duration) -> Duration {
        let told = event.at.map(|at| self.clock.since_origin(at));
        told.filter(|told| told.abs_diff(arrived) <= CLOCK_DIFFERENCE_MAX)
            .unwrap_or(arrived)
            .max(self.ordered)
    }

    fn since_order(&self, at: Duration) -> f64 {
        ms(at.saturating_sub(self.ordered))
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn number(info: &Value, place: &str) -> Option<f64> {
    info.pointer(place).and_then(Value::as_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const MS: Duration = Duration::from_millis(1);

    fn pass(number: u32) -> Event {
        Event { name: "MIGRATION_PASS".into(), data: json!({ "pass": number }), at: None }
    }

    fn active(sent: u64, left: u64, rate: u64) -> Value {
        json!({ "status": "active", "expected-downtime": 7, "cpu-throttle-percentage": 10 + rate, "ram": {
            "transferred": sent * 5000, "remaining": left * 4096, "total": 1000 * 4096, "page-size": 4096,
            "normal": sent / 2, "duplicate": sent - sent / 2, "dirty-pages-rate": rate, "dirty-sync-count": 1 } })
    }

    #[test]
    fn rounds_are_told_apart_by_the_moments_at_which_they_began() {
        let mut progress = Progress::new(LabClock::start(), 100 * MS);
        assert!(progress.source_event(&pass(1), 102 * MS));
        assert_eq!(progress.look(&active(0, 1000, 0), 102 * MS), Status::Active);
        assert_eq!(progress.look(&active(800, 200, 0), 110 * MS), Status::Active);
        // QEMU has no figures while it is busy with something else.
        assert_eq!(progress.look(&json!({ "status": "device" }), 111 * MS), Status::UnderWay);
        // Half way between these looks, 200 pages left over and 100 dirtied since.
        progress.source_event(&pass(2), 115 * MS);
        assert_eq!(progress.passes(), 2);
        progress.look(&active(1200, 100, 30), 120 * MS);
        progress.source_event(&pass(3), 130 * MS);
        let done = json!({ "status": "completed", "total-time": 41, "downtime": 3, "setup-time": 1, "ram": {
            "transferred": 6_500_000, "remaining": 0, "total": 4_096_000, "page-size": 4096, "normal": 700,
            "duplicate": 600, "dirty-sync-count": 3, "mbps": 1.5 } });
        assert_eq!(progress.look(&done, 140 * MS), Status::Completed);
        let report = progress.report(141 * MS);
        let seen: Vec<_> = report
            .rounds
            .iter()
            .map(|round| (round.round, round.dirty_pages, round.sent_pages, round.wire_bytes))
            .collect();
        assert_eq!(
            seen,
            [
                (1, Some(1000), Some(1000), Some(5_000_000)),
                (2, Some(300), Some(250), Some(1_250_000)),
                (3, Some(50), Some(50), Some(250_000)),
            ]
        );
        let times: Vec<_> = report.rounds.iter().map(|round| (round.from_ms, round.ms)).collect();
        assert_eq!(times[1], (Some(15.0), Some(15.0)));
        assert_eq!((report.downtime_ms, report.forecast_ms), (Some(3.0), Some(7.0)));
        assert_eq!((report.wire_bytes, report.round_count), (Some(6_500_000), Some(3)));
        assert_eq!(report.dirty_pages[1], (10.0, 200.0));
        let more: std::collections::BTreeMap<_, _> = report.more.into_iter().collect();
        assert_eq!((more["total_own_ms"], more["setup_ms"], more["throughput_mbit_s"]), (41.0, 1.0, 1.5));
        assert_eq!(more["throttle_percent_max"], 40.0);
        assert!(!more.contains_key("xbzrle_pages"));
    }

    #[test]
    fn moments_are_qemus_where_its_clock_is_ours() {
        let clock = LabClock::start();
        let mut progress = Progress::new(clock, 10 * MS);
        let at = |since: Duration| clock.origin_unix().checked_add(since);
        progress.source_event(&Event { at: at(300 * MS), ..pass(1) }, 305 * MS);
        progress.source_event(&Event { at: at(9000 * MS), ..pass(2) }, 310 * MS);
        assert_eq!(progress.passes, [(1, 300 * MS), (2, 310 * MS)]);
        assert!(!progress.source_event(&Event { name: "STOP".into(), ..pass(0) }, 320 * MS));
        let stop = Event { name: "STOP".into(), data: Value::Null, at: at(320 * MS) };
        progress.source_event(&stop, 320 * MS);
        progress.target_resumed(at(332 * MS));
        let report = progress.report(340 * MS);
        assert_eq!(report.more, [("stop_to_resume_ms".to_owned(), 12.0)]);
        // Nothing is made up where nothing was told.
        assert_eq!((report.downtime_ms, report.forecast_ms, report.wire_bytes), (None, None, None));
    }

    #[test]
    fn words_of_the_status_are_known_and_others_are_on_the_way() {
        let words = ["setup", "active", "postcopy-active", "device", "completed", "cancelled", "brand-new"];
        use Status::{Active, Cancelled, Completed, PostCopy, UnderWay};
        let meant = [UnderWay, Active, PostCopy, UnderWay, Completed, Cancelled, UnderWay];
        assert_eq!(words.map(Status::of), meant);
        assert_eq!((Status::of("failed"), Status::of("postcopy-paused")), (Status::Failed, Status::Failed));
    }
}
