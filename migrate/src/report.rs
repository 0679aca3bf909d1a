//! A migration in numbers, as programs get it: plain values with their units in their names.
//!
//! The JSON of `ferry migrate --json` is [`MigrationReport`]; fields are only ever added.

use std::time::Duration;

use ferry_protocol::encode::Encoded;
use ferry_protocol::encode::pack::Method;
use ferry_protocol::policy::{Estimate, Forecast};
use ferry_protocol::source::{Downtime, MemoryPath, Reconnection, RoundReport, Summary};
use serde::{Deserialize, Serialize};

/// How memory got to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportKind {
    /// Page by page, while the guest ran.
    #[default]
    Live,
    /// It was handed over to another process of the same host: no page was copied, so there are no rounds and there is no
    /// digest.
    Local,
}

/// A successful migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// How memory got there; reports of older versions are all [`ReportKind::Live`].
    #[serde(default)]
    pub kind: ReportKind,
    /// The VM's name.
    pub name: String,
    /// The target's host name.
    pub host: String,
    /// The epoch in which the target runs it.
    pub epoch: u64,
    /// From asking the vCPUs to stop at the source to the target's word that the guest runs, in ms: at least
    /// what the guest saw.
    pub downtime_ms: f64,
    /// What was allowed.
    pub downtime_budget_ms: f64,
    /// The downtime by part; the parts follow each other and add up to it.
    pub downtime_parts: DowntimeParts,
    /// What was forecast when the guest was stopped.
    pub forecast: ForecastReport,
    /// From the start to the target's word that the guest runs, in ms.
    pub total_ms: f64,
    /// Bytes written to the data streams.
    pub wire_bytes: u64,
    /// Every round; the last was sent while the guest stood still.
    pub rounds: Vec<Round>,
    /// Every time that the link broke before the commit and was made again.
    #[serde(default)]
    pub reconnections: Vec<ReconnectionReport>,
    /// What each data stream did, in the order of their numbers; empty where the caller has not filled it in from
    /// [`crate::Update::Streams`].
    #[serde(default)]
    pub streams: Vec<StreamWork>,
    /// Whether digests of memory were compared before the guest resumed. If not, the next two are absent: either `--verify
    /// off` was asked for, so that nothing proves that the two memories are the same, or memory was handed over
    /// ([`ReportKind::Local`]), so that there is only one.
    pub verified: bool,
    /// The digest of guest memory, in hexadecimal.
    pub digest: Option<String>,
    /// Whether source and target agreed on it. A guest is never resumed where they do not.
    pub digest_equal: Option<bool>,
}

/// A link that broke before the commit and was made again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReconnectionReport {
    /// The round that was under way or had just arrived.
    pub round: u32,
    /// Of the round under way, pages that had arrived and were not sent again.
    pub arrived_pages: u64,
    /// Pages that were put back as dirty, to be sent with the next round.
    pub again_pages: u64,
    /// From the loss until pre-copy went on, in ms.
    pub ms: f64,
}

impl From<&Reconnection> for ReconnectionReport {
    fn from(reconnection: &Reconnection) -> Self {
        let Reconnection { round, arrived_pages, again_pages, took } = *reconnection;
        Self { round, arrived_pages, again_pages, ms: ms(took) }
    }
}

/// The parts of a downtime, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// Stopping vCPUs and devices.
    pub pause_ms: f64,
    /// Reading the last dirty log.
    pub dirty_log_ms: f64,
    /// Sending the last pages while the state is saved.
    pub copy_ms: f64,
    /// Until the target has everything, agrees on the digest and has restored the state.
    pub prepare_ms: f64,
    /// The commit record at the source.
    pub record_ms: f64,
    /// From `Commit` to `Running`.
    pub commit_ms: f64,
    /// Of `copy_ms`: saving the state.
    pub within_save_ms: f64,
    /// Of `prepare_ms`: until the last pages had arrived at the target.
    #[serde(default)]
    pub within_wait_ms: f64,
    /// Of `prepare_ms` (or before it): restoring the state at the target.
    pub within_restore_ms: f64,
    /// Of `commit_ms`: the record at the target.
    pub within_target_record_ms: f64,
    /// Of `commit_ms`: starting the vCPUs.
    pub within_run_ms: f64,
}

/// A forecast downtime, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ForecastReport {
    /// What is expected.
    pub expected_ms: f64,
    /// What will hardly be exceeded; the guest is stopped only if this fits the budget.
    pub upper_ms: f64,
    /// Expected, by part.
    pub pause_ms: f64,
    /// Expected, by part.
    pub dirty_log_ms: f64,
    /// Expected, by part.
    pub copy_ms: f64,
    /// Expected, by part.
    pub prepare_ms: f64,
    /// Expected, by part.
    pub record_ms: f64,
    /// Expected, by part.
    pub commit_ms: f64,
}

/// One round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Counted from 1.
    pub round: u32,
    /// Pages that were dirty when it began.
    pub dirty_pages: u64,
    /// Pages that were sent, of any kind.
    pub sent_pages: u64,
    /// Of these: pages of zeroes.
    pub zero_pages: u64,
    /// Of these: packed.
    pub packed_pages: u64,
    /// Of these: only the blocks that had changed.
    pub delta_pages: u64,
    /// Of these: nothing, since the target had them already.
    pub unchanged_pages: u64,
    /// Pages of which the target was not told, because nothing ever touched them.
    pub untouched_pages: u64,
    /// Bytes on the data streams.
    pub wire_bytes: u64,
    /// How long it took, in ms, until all had arrived.
    pub ms: f64,
    /// The rate on the data streams, in bytes/s.
    pub link_bytes_per_s: f64,
    /// Pages that the guest dirtied per second meanwhile; absent for the last round.
    pub dirtied_pages_per_s: Option<f64>,
    /// The downtime that stopping right after it would have caused; absent for the last round.
    pub forecast: Option<ForecastReport>,
}

/// What packing did for a data stream. It goes on in threads beside the stream's own.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PackingWork {
    /// Bytes of pages that were tried with lz4.
    pub lz4_bytes: u64,
    /// Bytes of pages that were tried with zstd of level 1 or 2.
    pub zstd_bytes: u64,
    /// The same with higher levels.
    pub zstd_high_bytes: u64,
    /// What all of that came to, in bytes, where it was worth it.
    pub packed_bytes: u64,
    /// Pages that were sent unpacked because the link would have run dry.
    pub filled_pages: u64,
    /// Time of the packing threads, in ms.
    pub packing_ms: f64,
}

impl PackingWork {
    pub(crate) fn add(&mut self, method: Method, encoded: &Encoded, took: Duration) {
        let tried = match method {
            Method::None => return,
            Method::Lz4 => &mut self.lz4_bytes,
            Method::Zstd(..=2) => &mut self.zstd_bytes,
            Method::Zstd(_) => &mut self.zstd_high_bytes,
        };
        *tried += encoded.packing.from_bytes;
        self.packed_bytes += encoded.packing.to_bytes;
        self.packing_ms += ms(took);
    }

    fn add_all(&mut self, more: &Self) {
        let Self { lz4_bytes, zstd_bytes, zstd_high_bytes, packed_bytes, filled_pages, packing_ms } = more;
        self.lz4_bytes += lz4_bytes;
        self.zstd_bytes += zstd_bytes;
        self.zstd_high_bytes += zstd_high_bytes;
        self.packed_bytes += packed_bytes;
        self.filled_pages += filled_pages;
        self.packing_ms += packing_ms;
    }
}

/// What a data stream has done; its times follow each other, so they add up to the time in which it had work.
///
/// For programs its times are in ms, as `socket_ms`, `cap_ms` and `encoding_ms`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StreamWork {
    /// Pages that travelled as they are.
    pub raw_pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that travelled packed.
    pub packed_pages: u64,
    /// Pages of which only the changed blocks travelled.
    pub delta_pages: u64,
    /// Pages that the target had already.
    pub unchanged_pages: u64,
    /// Bytes written, frame headers included.
    pub wire_bytes: u64,
    /// In the socket's write calls: copying and waiting for room.
    #[serde(rename = "socket_ms", with = "milliseconds")]
    pub in_socket: Duration,
    /// Waiting for the bandwidth cap.
    #[serde(rename = "cap_ms", with = "milliseconds")]
    pub in_cap: Duration,
    /// The rest: reading pages, digests, waiting for packed ones.
    #[serde(rename = "encoding_ms", with = "milliseconds")]
    pub encoding: Duration,
    /// What was packed beside it.
    pub packing: PackingWork,
    /// What the link took of this stream when it was last full, in bytes/s; `null` if it never was.
    pub link_bytes_per_s: Option<f64>,
}

impl StreamWork {
    pub(crate) fn add(&mut self, more: &Self) {
        let Self {
            raw_pages,
            zero_pages,
            packed_pages,
            delta_pages,
            unchanged_pages,
            wire_bytes,
            in_socket,
            in_cap,
            encoding,
            packing,
            link_bytes_per_s,
        } = more;
        self.packing.add_all(packing);
        self.link_bytes_per_s = link_bytes_per_s.or(self.link_bytes_per_s);
        self.raw_pages += raw_pages;
        self.zero_pages += zero_pages;
        self.packed_pages += packed_pages;
        self.delta_pages += delta_pages;
        self.unchanged_pages += unchanged_pages;
        self.wire_bytes += wire_bytes;
        self.in_socket += *in_socket;
        self.in_cap += *in_cap;
        self.encoding += *encoding;
    }
}

/// A duration in ms.
#[must_use]
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Durations as numbers of ms.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(super::ms(*duration))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let ms = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(ms / 1e3).map_err(serde::de::Error::custom)
    }
}

impl MigrationReport {
    /// The report of a migration of VM `name` that was allowed `budget`.
    #[must_use]
    pub fn new(name: &str, budget: Duration, summary: &Summary) -> Self {
        let Summary {
            epoch,
            host,
            memory,
            rounds,
            reconnections,
            downtime,
            forecast,
            total,
            verified,
            digest,
            target_digest,
        } = summary;
        let rounds: Vec<Round> = rounds.iter().map(Round::from).collect();
        Self {
            kind: match memory {
                MemoryPath::Streams => ReportKind::Live,
                MemoryPath::HandedOver => ReportKind::Local,
            },
            name: name.to_owned(),
            host: host.clone(),
            epoch: epoch.number(),
            downtime_ms: ms(downtime.total()),
            downtime_budget_ms: ms(budget),
            downtime_parts: downtime.into(),
            forecast: forecast.into(),
            total_ms: ms(*total),
            wire_bytes: rounds.iter().map(|round| round.wire_bytes).sum(),
            rounds,
            reconnections: reconnections.iter().map(ReconnectionReport::from).collect(),
            streams: Vec::new(),
            verified: *verified,
            digest: verified.then(|| digest.to_string()),
            digest_equal: verified.then_some(digest == target_digest),
        }
    }
}

impl From<&Downtime> for DowntimeParts {
    fn from(downtime: &Downtime) -> Self {
        let Downtime {
            pause,
            dirty_log,
            copy,
            prepare,
            record,
            commit,
            within_save,
            within_wait,
            within_restore,
            within_target_record,
            within_run,
        } = *downtime;
        Self {
            pause_ms: ms(pause),
            dirty_log_ms: ms(dirty_log),
            copy_ms: ms(copy),
            prepare_ms: ms(prepare),
            record_ms: ms(record),
            commit_ms: ms(commit),
            within_save_ms: ms(within_save),
            within_wait_ms: ms(within_wait),
            within_restore_ms: ms(within_restore),
            within_target_record_ms: ms(within_target_record),
            within_run_ms: ms(within_run),
        }
    }
}

impl From<&Forecast> for ForecastReport {
    fn from(forecast: &Forecast) -> Self {
        let Forecast { pause, dirty_log, copy, prepare, record, commit } = *forecast;
        let expected = |part: Estimate| ms(part.expected);
        let total = forecast.total();
        Self {
            expected_ms: ms(total.expected),
            upper_ms: ms(total.upper()),
            pause_ms: expected(pause),
            dirty_log_ms: expected(dirty_log),
            copy_ms: expected(copy),
            prepare_ms: expected(prepare),
            record_ms: expected(record),
            commit_ms: expected(commit),
        }
    }
}

impl Round {
    /// Pages that travelled as they are.
    #[must_use]
    pub const fn whole_pages(&self) -> u64 {
        let others = self.zero_pages + self.packed_pages + self.delta_pages + self.unchanged_pages;
        self.sent_pages.saturating_sub(others)
    }
}

impl From<&RoundReport> for Round {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people needs no more than 53 bits")]
    fn from(report: &RoundReport) -> Self {
        let RoundReport { round, dirty_pages, sent, took, dirtied_per_s, forecast } = report;
        let seconds = took.as_secs_f64();
        let link_bytes_per_s = if seconds > 0.0 { sent.wire_bytes as f64 / seconds } else { 0.0 };
        Self {
            round: *round,
            dirty_pages: *dirty_pages,
            sent_pages: sent.pages(),
            zero_pages: sent.zero_pages,
            packed_pages: sent.packed_pages,
            delta_pages: sent.delta_pages,
            unchanged_pages: sent.unchanged_pages,
            untouched_pages: sent.untouched_pages,
            wire_bytes: sent.wire_bytes,
            ms: ms(*took),
            link_bytes_per_s,
            dirtied_pages_per_s: *dirtied_per_s,
            forecast: forecast.as_ref().map(ForecastReport::from),
        }
    }
}
