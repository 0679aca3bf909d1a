//! What each [`Metric`] is called, where it comes from, and how it is counted.

use crate::results::{Measures, Metric, Outcome, ProcessCost, ProcessRole, Run};

/// What a metric is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Seconds.
    S,
    /// Bytes.
    Bytes,
    /// Things.
    Count,
    /// A share of one.
    Share,
}

/// How two values of a metric are held against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// By their ratio: the metric is above zero by nature.
    Ratio,
    /// By their difference: it can be zero or less.
    Difference,
}

impl Metric {
    /// All of them, in the order of reports.
    pub const ALL: [Self; 14] = [
        Self::TotalMs,
        Self::DowntimeGuestMs,
        Self::DowntimeEngineMs,
        Self::DowntimeUntoldMs,
        Self::UdpGapMs,
        Self::TcpStallMs,
        Self::HttpGapMs,
        Self::HttpFailed,
        Self::WireBytes,
        Self::CpuS,
        Self::PeakMemoryBytes,
        Self::MemoryOverheadSourceBytes,
        Self::MemoryOverheadTargetBytes,
        Self::SlowDown,
    ];

    /// Those that every scenario has and that reports begin with.
    pub const MAIN: [Self; 4] = [Self::TotalMs, Self::DowntimeGuestMs, Self::CpuS, Self::WireBytes];

    /// Its name in the JSON, in CSV files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TotalMs => "total_ms",
            Self::DowntimeGuestMs => "downtime_guest_ms",
            Self::DowntimeEngineMs => "downtime_engine_ms",
            Self::DowntimeUntoldMs => "downtime_untold_ms",
            Self::UdpGapMs => "udp_gap_ms",
            Self::TcpStallMs => "tcp_stall_ms",
            Self::HttpGapMs => "http_gap_ms",
            Self::HttpFailed => "http_failed",
            Self::WireBytes => "wire_bytes",
            Self::CpuS => "cpu_s",
            Self::PeakMemoryBytes => "peak_memory_bytes",
            Self::MemoryOverheadSourceBytes => "memory_overhead_source_bytes",
            Self::MemoryOverheadTargetBytes => "memory_overhead_target_bytes",
            Self::SlowDown => "slow_down",
        }
    }

    /// The metric of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// For headings and axes, without its unit.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::TotalMs => "total time",
            Self::DowntimeGuestMs => "downtime, guest",
            Self::DowntimeEngineMs => "downtime, engine",
            Self::DowntimeUntoldMs => "downtime untold",
            Self::UdpGapMs => "UDP gap",
            Self::TcpStallMs => "TCP stall",
            Self::HttpGapMs => "HTTP gap",
            Self::HttpFailed => "HTTP failures",
            Self::WireBytes => "on the wire",
            Self::CpuS => "CPU time",
            Self::PeakMemoryBytes => "peak memory",
            Self::MemoryOverheadSourceBytes => "source's own memory",
            Self::MemoryOverheadTargetBytes => "target's own memory",
            Self::SlowDown => "guest slowed by",
        }
    }

    /// What it is and where it comes from, in a sentence or two.
    #[must_use]
    pub fn method(self) -> &'static str {
        match self {
            Self::TotalMs => {
                "From the order to migrate to the engine's word that it is done, by the harness's clock."
            }
            Self::DowntimeGuestMs => {
                "The longest gap between two heartbeats of the guest since the order, read from guest memory from \
                 outside; the heartbeat's own period of 1 ms is part of it."
            }
            Self::DowntimeEngineMs => "The engine's own word on how long the guest stood still.",
            Self::DowntimeUntoldMs => {
                "The guest's downtime less the engine's: what the engine does not count, such as starting vCPUs and \
                 waiting for a core."
            }
            Self::UdpGapMs => {
                "The longest time without an echo at a client outside both hosts that sends a datagram every \
                 millisecond."
            }
            Self::TcpStallMs => {
                "The longest silence of one TCP connection of that client while an answer was due; the sender's \
                 retransmission timer is part of it."
            }
            Self::HttpGapMs => {
                "The longest time in which none of the client's web connections received any byte of an answer."
            }
            Self::HttpFailed => "Web requests that were not answered, or not rightly.",
            Self::WireBytes => {
                "Bytes between the hosts in both directions, headers of all layers included, from interface \
                 counters; the client's traffic is taken off."
            }
            Self::CpuS => {
                "CPU time of both VMMs from /proc, from the order to the end, all threads but those of vCPUs."
            }
            Self::PeakMemoryBytes => {
                "The most memory that each VMM had in use at once, guest memory included, both together."
            }
            Self::MemoryOverheadSourceBytes => {
                "The most memory that the source had in use at once, less what its guest had in use when the order was \
                 given: the VMM itself, buffers, caches, and guest memory that was touched only to migrate it. Pages \
                 that a process maps count, whoever shares them; memory of the kernel does not."
            }
            Self::MemoryOverheadTargetBytes => {
                "The most memory that the target had in use at once, less what its guest has in use at the end, but no \
                 more than it had at the source."
            }
            Self::SlowDown => {
                "By how much slower the guest wrote its memory during the migration, standstill included, than \
                 before it: 1 less the ratio of the rates."
            }
        }
    }

    /// What it is counted in.
    #[must_use]
    pub fn unit(self) -> Unit {
        match self {
            Self::TotalMs
            | Self::DowntimeGuestMs
            | Self::DowntimeEngineMs
            | Self::DowntimeUntoldMs
            | Self::UdpGapMs
            | Self::TcpStallMs
            | Self::HttpGapMs => Unit::Ms,
            Self::HttpFailed => Unit::Count,
            Self::WireBytes
            | Self::PeakMemoryBytes
            | Self::MemoryOverheadSourceBytes
            | Self::MemoryOverheadTargetBytes => Unit::Bytes,
            Self::CpuS => Unit::S,
            Self::SlowDown => Unit::Share,
        }
    }

    /// How two of its values are held against each other. Of all metrics less is better.
    #[must_use]
    pub fn against(self) -> Against {
        match self {
            Self::DowntimeUntoldMs
            | Self::HttpFailed
            | Self::MemoryOverheadSourceBytes
            | Self::MemoryOverheadTargetBytes
            | Self::SlowDown => Against::Difference,
            Self::TotalMs
            | Self::DowntimeGuestMs
            | Self::DowntimeEngineMs
            | Self::UdpGapMs
            | Self::TcpStallMs
            | Self::HttpGapMs
            | Self::WireBytes
            | Self::CpuS
            | Self::PeakMemoryBytes => Against::Ratio,
        }
    }

    /// Its value in one run, if it was measured.
    #[must_use]
    pub fn of(self, measures: &Measures) -> Option<f64> {
        let client = measures.client.as_ref();
        let value = match self {
            Self::TotalMs => measures.total_ms,
            Self::DowntimeGuestMs => measures.downtime_guest_ms,
            Self::DowntimeEngineMs => measures.downtime_engine_ms,
            Self::DowntimeUntoldMs => measures
                .downtime_guest_ms
                .zip(measures.downtime_engine_ms)
                .map(|(guest, engine)| guest - engine),
            Self::UdpGapMs => client.and_then(|client| client.udp_gap_ms),
            Self::TcpStallMs => client.and_then(|client| client.tcp_stall_ms),
            Self::HttpGapMs => client.and_then(|client| client.http_gap_ms),
            Self::HttpFailed => client.and_then(|client| client.http_failed).map(|failed| failed as f64),
            Self::WireBytes => measures.wire_bytes.map(|bytes| bytes as f64),
            Self::CpuS => of_both(measures, |process| process.cpu_engine_s),
            Self::PeakMemoryBytes => of_both(measures, |process| process.peak_memory_bytes as f64),
            Self::MemoryOverheadSourceBytes => side(measures, ProcessRole::Source)
                .and_then(|source| beyond(source, source.guest_memory_bytes?)),
            Self::MemoryOverheadTargetBytes => {
                let source = side(measures, ProcessRole::Source).and_then(|source| source.guest_memory_bytes);
                let target = side(measures, ProcessRole::Target);
                source
                    .zip(target)
                    .and_then(|(had, target)| beyond(target, target.guest_memory_bytes?.min(had)))
            }
            Self::SlowDown => {
                let rates = measures.guest_pages_per_s_before.zip(measures.guest_pages_per_s_during);
                rates.filter(|(before, _)| *before > 0.0).map(|(before, during)| 1.0 - during / before)
            }
        };
        value.filter(|value| value.is_finite())
    }
}

/// A figure of source and target together, if both have been seen.
fn of_both(measures: &Measures, figure: impl Fn(&ProcessCost) -> f64) -> Option<f64> {
    Some(figure(side(measures, ProcessRole::Source)?) + figure(side(measures, ProcessRole::Target)?))
}

fn side(measures: &Measures, role: ProcessRole) -> Option<&ProcessCost> {
    measures.processes.iter().find(|process| process.role == role)
}

/// What `process` had in use at its peak beyond `guest_bytes`; `None` if its peak is not known. It can be a little less
/// than nothing, as the kernel counts by thread.
fn beyond(process: &ProcessCost, guest_bytes: u64) -> Option<f64> {
    (process.peak_memory_bytes > 0).then_some(process.peak_memory_bytes as f64 - guest_bytes as f64)
}

impl Run {
    /// Whether it moved its guest and nothing shows that the guest was harmed. Only such runs count for summaries.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.outcome == Outcome::Moved && self.harm().is_none()
    }

    /// What was wrong with the guest after it had moved, in words.
    #[must_use]
    pub fn harm(&self) -> Option<String> {
        let check = &self.measures.check;
        match check.errors {
            Some(errors) if errors > 0 => {
                Some(format!("the guest found {errors} of its pages changed or lost"))
            }
            Some(_) | None if check.digest_equal == Some(false) => {
                Some("the digests of its memory differ".to_owned())
            }
            Some(_) | None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Check, ClientSeen};

    #[test]
    fn names_are_those_of_the_json_and_lead_back() {
        for metric in Metric::ALL {
            assert_eq!(serde_json::to_value(metric).unwrap(), metric.name());
            assert_eq!(Metric::from_name(metric.name()), Some(metric));
        }
    }

    #[test]
    fn figures_that_take_several_measures_are_put_together_or_missing() {
        let process = |role, cpu_engine_s, guest_memory_bytes| ProcessCost {
            role,
            cpu_s: 9.0,
            cpu_engine_s,
            threads: Vec::new(),
            peak_memory_bytes: 5,
            guest_memory_bytes: Some(guest_memory_bytes),
        };
        let mut measures = Measures {
            downtime_guest_ms: Some(12.0),
            downtime_engine_ms: Some(10.5),
            guest_pages_per_s_before: Some(1000.0),
            guest_pages_per_s_during: Some(750.0),
            processes: vec![
                process(ProcessRole::Source, 1.5, 3),
                // It has touched more than the guest had: what is more is overhead.
                process(ProcessRole::Target, 0.25, 4),
            ],
            client: Some(ClientSeen { http_failed: Some(3), ..ClientSeen::default() }),
            ..Measures::default()
        };
        let values = |measures: &Measures| Metric::ALL.map(|metric| metric.of(measures));
        assert_eq!(
            values(&measures),
            [
                None,
                Some(12.0),
                Some(10.5),
                Some(1.5),
                None,
                None,
                None,
                Some(3.0),
                None,
                Some(1.75),
                Some(10.0),
                Some(2.0),
                Some(2.0),
                Some(0.25)
            ]
        );
        measures.processes[1].guest_memory_bytes = Some(1);
        assert_eq!(Metric::MemoryOverheadTargetBytes.of(&measures), Some(4.0), "zero pages are not there");
        measures.processes[0].guest_memory_bytes = None;
        for metric in [Metric::MemoryOverheadSourceBytes, Metric::MemoryOverheadTargetBytes] {
            assert_eq!(metric.of(&measures), None, "without a guest: {metric:?}");
        }
        measures.processes.pop();
        measures.downtime_engine_ms = None;
        measures.guest_pages_per_s_before = Some(0.0);
        for metric in [Metric::CpuS, Metric::PeakMemoryBytes, Metric::DowntimeUntoldMs, Metric::SlowDown] {
            assert_eq!(metric.of(&measures), None, "{metric:?}");
        }
    }

    #[test]
    fn a_harmed_guest_is_no_sound_run() {
        let mut run = Run {
            engine: "a".to_owned(),
            repetition: 0,
            at_s: 0.0,
            outcome: Outcome::Moved,
            measures: Measures::default(),
            timeline: crate::results::Timeline::default(),
            flags: Vec::new(),
        };
        assert!(run.is_sound());
        run.measures.check = Check { errors: Some(2), digest_equal: Some(true), ..Check::default() };
        assert!(!run.is_sound() && run.harm().unwrap().contains("2 of its pages"));
        run.measures.check = Check { errors: Some(0), digest_equal: Some(false), ..Check::default() };
        assert!(!run.is_sound());
        run.measures.check = Check::default();
        run.outcome = Outcome::NotConverged;
        assert!(!run.is_sound());
    }
}
