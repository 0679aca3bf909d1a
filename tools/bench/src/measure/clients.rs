//! What users of the guest see: web requests, a datagram a millisecond, one watched connection.

use std::net::SocketAddr;
use std::time::Duration;

use ferry_guest_abi::{HTTP_FILE_LEN, HTTP_FILE_PATH, UDP_ECHO_PORT};
use ferry_lab::http::fetch_when_served;
use ferry_lab::http::report::RequestRecord;
use ferry_lab::network::lab::VM_IPV4;
use ferry_lab::probe::{TcpProbe, UdpProbe};
use ferry_lab::timeline::Gap;
use ferry_lab::{ExpectedBody, HttpLoad, HttpTarget, LabClock, Namespace};

use hdrhistogram::Histogram;

use super::MeasureError;
use crate::results::ClientSeen;
use crate::scenario::Client;

/// How long the guest may take to serve its first request.
const SERVED_TIMEOUT: Duration = Duration::from_secs(30);

/// The TCP probe's rest between two requests.
const TCP_PAUSE: Duration = Duration::from_millis(5);

/// The width of a bar of the throughput's timeline.
const TIMELINE_STEP_MS: u64 = 20;

const HTTP_PORT: u16 = 80;

/// Significant digits of latencies.
const LATENCY_DIGITS: u8 = 3;

/// Which latencies are reported; the last is the longest.
const LATENCY_QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 1.0];

/// Clients at work. Dropping it ends them.
#[derive(Debug)]
pub struct Clients {
    http: Option<HttpLoad>,
    udp: Option<UdpProbe>,
    tcp: Option<TcpProbe>,
}

impl Clients {
    /// Waits until the guest serves, then starts the clients that `wanted` asks for inside `namespace`.
    ///
    /// # Errors
    /// [`MeasureError::Client`] if the guest does not serve, or a client can't start.
    pub fn start(wanted: Client, namespace: &Namespace, clock: LabClock) -> Result<Self, MeasureError> {
        let failed =
            |what, source: Box<dyn std::error::Error + Send + Sync>| MeasureError::Client { what, source };
        let length = HTTP_FILE_LEN as u64;
        let target = HttpTarget::new(SocketAddr::new(VM_IPV4.into(), HTTP_PORT), HTTP_FILE_PATH)
            .expecting(ExpectedBody::Length(length));
        fetch_when_served(namespace, clock, &target, SERVED_TIMEOUT)
            .map_err(|error| failed("the load: the guest does not serve", error.into()))?;
        let udp = wanted.udp.then(|| {
            UdpProbe::start(namespace, clock, SocketAddr::new(VM_IPV4.into(), UDP_ECHO_PORT))
                .map_err(|error| failed("the UDP probe", error.into()))
        });
        let tcp = wanted.tcp.then(|| {
            TcpProbe::start(namespace, clock, target.clone(), TCP_PAUSE)
                .map_err(|error| failed("the TCP probe", error.into()))
        });
        let connections = usize::try_from(wanted.http_connections).unwrap_or(usize::MAX);
        let http = (connections > 0).then(|| {
            HttpLoad::start(namespace, clock, target, connections)
                .map_err(|error| failed("the web load", error.into()))
        });
        Ok(Self { http: http.transpose()?, udp: udp.transpose()?, tcp: tcp.transpose()? })
    }

    /// The order is about to be given: the watched connection's stalls count from now on. A guest that has just booted
    /// refuses some first connections, which is none of the migration's business.
    pub fn order_is_near(&self) {
        if let Some(tcp) = &self.tcp {
            tcp.forget_stalls();
        }
    }

    /// Ends the clients and says what they saw since `since_ms`; with the throughput as points of clock time in ms and
    /// bytes/s. Counts are of the whole time.
    #[must_use]
    pub fn stop(self, clock: LabClock, since_ms: f64) -> (ClientSeen, Vec<(f64, f64)>) {
        let mut seen = ClientSeen::default();
        let until_ms = clock.now_ms();
        // The load first: what it still has under way is answered while the others listen.
        let http = self.http.map(HttpLoad::stop);
        if let Some(report) = self.udp.map(UdpProbe::stop) {
            seen.udp_gap_ms = Some(longest_between(since_ms, until_ms, report.longest_gap, &report.gaps));
            seen.udp_send_gap_ms = Some(report.longest_send_gap.ms);
            seen.udp_sent = Some(report.sent);
            seen.udp_lost = Some(report.lost);
        }
        if let Some(report) = self.tcp.map(TcpProbe::stop) {
            seen.tcp_stall_ms = Some(report.longest_stall.ms);
            seen.tcp_broken = Some(report.broken.is_some());
        }
        let Some(report) = http else { return (seen, Vec::new()) };
        seen.http_gap_ms =
            Some(longest_between(since_ms, until_ms, report.longest_data_gap, &report.data_gaps));
        seen.http_ok = Some(report.ok);
        seen.http_failed = Some(report.failed);
        seen.http_latency_ms = latencies(&report.requests, since_ms);
        let rates = report.timeline.samples(TIMELINE_STEP_MS);
        (seen, rates.into_iter().map(|(ms, mib_per_s)| (ms, mib_per_s * 1024.0 * 1024.0)).collect())
    }
}

/// Quantiles of how long the right answers since `since_ms` took, as `(quantile, ms)`; none if there was none.
fn latencies(requests: &[RequestRecord], since_ms: f64) -> Vec<(f64, f64)> {
    let Ok(mut histogram) = Histogram::<u64>::new(LATENCY_DIGITS) else { return Vec::new() };
    #[expect(clippy::cast_precision_loss, reason = "microseconds of a run")]
    let recent = requests.iter().filter(|request| request.ok && request.end_us as f64 / 1e3 >= since_ms);
    for request in recent {
        // It grows with what it is given, up to what it can count at all.
        let _ = histogram.record(request.end_us.saturating_sub(request.start_us));
    }
    if histogram.is_empty() {
        return Vec::new();
    }
    #[expect(clippy::cast_precision_loss, reason = "microseconds of a run")]
    let at = |quantile: f64| (quantile, histogram.value_at_quantile(quantile) as f64 / 1e3);
    LATENCY_QUANTILES.map(at).to_vec()
}

/// The longest of the `listed` gaps that ended after `since_ms`, as far as they lie before `until_ms`, when the clients
/// were told to stop asking. If there is none, no gap in between was long enough to be listed, and the shortest that was
/// bounds it.
fn longest_between(since_ms: f64, until_ms: f64, longest: Gap, listed: &[Gap]) -> f64 {
    let all = listed.iter().chain([&longest]);
    let between = all.filter(|gap| gap.from_ms + gap.ms > since_ms && gap.from_ms < until_ms);
    let found = between.map(|gap| gap.ms.min(until_ms - gap.from_ms)).fold(0.0, f64::max);
    let shortest_listed = listed.iter().map(|gap| gap.ms).fold(longest.ms, f64::min);
    if found > 0.0 { found } else { shortest_listed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_of_right_answers_since_the_order() {
        let request = |end_ms: u64, took_ms: u64, ok| RequestRecord {
            connection: 0,
            start_us: (end_ms - took_ms) * 1000,
            end_us: end_ms * 1000,
            ok,
        };
        let mut requests: Vec<_> = (1..=100).map(|ms| request(1000 + ms, ms, true)).collect();
        requests.extend([request(500, 400, true), request(1500, 700, false)]);
        let seen = latencies(&requests, 1000.0);
        for ((quantile, ms), expected) in seen.iter().zip([50.0, 90.0, 99.0, 100.0]) {
            assert!((ms - expected).abs() <= expected / 500.0, "{quantile}: {ms}");
        }
        assert_eq!(seen.len(), 4);
        assert!(latencies(&requests, 1e9).is_empty());
    }

    #[test]
    fn only_gaps_since_the_order_count() {
        let gap = |from_ms, ms| Gap { from_ms, ms };
        let listed = [gap(100.0, 50.0), gap(900.0, 12.0), gap(1200.0, 30.0)];
        let longest = |since, until| longest_between(since, until, listed[0], &listed).round();
        let same = |seen: f64, expected: f64| assert!((seen - expected).abs() < 1e-9, "{seen}");
        same(longest(0.0, 1e9), 50.0);
        same(longest(905.0, 1e9), 30.0);
        same(longest(905.0, 1210.0), 12.0);
        same(longest(2000.0, 1e9), 12.0);
    }
}
