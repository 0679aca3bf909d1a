//! When to stop the guest: forecasts of downtime and the decision they lead to. Pure functions of what was
//! measured; nothing here remembers anything but [`LinkEstimate`].
//!
//! Convergence helpers (throttling, switching to post-copy) are not here yet.

use std::time::Duration;

/// A time with its error bar.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Estimate {
    /// What is expected.
    pub expected: Duration,
    /// How far off that may be, as about one mean deviation.
    pub error: Duration,
}

impl Estimate {
    /// An estimate with its error bar.
    #[must_use]
    pub const fn new(expected: Duration, error: Duration) -> Self {
        Self { expected, error }
    }

    /// The time that will hardly be exceeded: the expectation and twice the error.
    #[must_use]
    pub fn upper(self) -> Duration {
        self.expected + 2 * self.error
    }
}

/// How long a page that is not zero takes from being chosen to having arrived, measured round by round.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkEstimate {
    page_us: Option<Smoothed>,
    bytes_per_s: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Smoothed {
    mean: f64,
    deviation: f64,
}

/// Rounds with fewer pages say more of the round trip than of the link.
const PAGES_FOR_AN_ESTIMATE: u64 = 256;

/// What a page is taken to need before anything was measured: a link of 100 MB/s.
const PAGE_PRIOR: Duration = Duration::from_micros(40);

/// The weight of the newest round: conditions change, and the last round resembles the next most.
const NEWEST_WEIGHT: f64 = 0.5;

impl LinkEstimate {
    /// Takes in a round that moved `pages` pages (not counting zero pages) as `wire_bytes` in `took`.
    pub fn add_round(&mut self, pages: u64, wire_bytes: u64, took: Duration) {
        if pages < PAGES_FOR_AN_ESTIMATE || took.is_zero() {
            return;
        }
        self.bytes_per_s = float(wire_bytes) / took.as_secs_f64();
        let page_us = took.as_secs_f64() * 1e6 / float(pages);
        self.page_us = Some(match self.page_us {
            None => Smoothed { mean: page_us, deviation: page_us / 4.0 },
            Some(Smoothed { mean, deviation }) => Smoothed {
                mean: mean + NEWEST_WEIGHT * (page_us - mean),
                deviation: deviation + NEWEST_WEIGHT * ((page_us - mean).abs() - deviation),
            },
        });
    }

    /// The last measured rate on the wire, in bytes/s; zero before the first measurement.
    #[must_use]
    pub fn bytes_per_s(&self) -> f64 {
        self.bytes_per_s
    }

    /// How long `pages` pages will take.
    #[must_use]
    pub fn time_for(&self, pages: u64) -> Estimate {
        let (mean, deviation) = match self.page_us {
            Some(Smoothed { mean, deviation }) => (mean, deviation),
            None => (PAGE_PRIOR.as_secs_f64() * 1e6, PAGE_PRIOR.as_secs_f64() * 1e6),
        };
        let of = |page_us: f64| Duration::from_secs_f64((page_us * float(pages) / 1e6).min(1e9));
        Estimate::new(of(mean), of(deviation))
    }
}

/// What was measured that a downtime is made of, besides sending pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedCosts {
    /// Stopping the vCPUs and device threads.
    pub pause: Estimate,
    /// Reading the last dirty log.
    pub dirty_log: Estimate,
    /// Saving the state at the source and restoring it at the target.
    pub state: Estimate,
    /// One round trip on the control connection.
    pub round_trip: Estimate,
    /// Writing the durable record at the source.
    pub source_record: Estimate,
    /// Writing the durable record at the target.
    pub target_record: Estimate,
    /// Starting the vCPUs at the target.
    pub resume: Estimate,
}

const fn ms(expected: u64, error: u64) -> Estimate {
    Estimate::new(Duration::from_millis(expected), Duration::from_millis(error))
}

impl Default for FixedCosts {
    /// What is assumed before anything was measured; each is replaced by a measurement as soon as there is one.
    fn default() -> Self {
        Self {
            pause: ms(1, 1),
            dirty_log: ms(1, 1),
            state: ms(2, 1),
            round_trip: ms(1, 1),
            source_record: ms(2, 2),
            target_record: ms(2, 2),
            resume: ms(1, 0),
        }
    }
}

/// The downtime that stopping now would cause, by part. The parts follow each other, so they add up.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Forecast {
    /// Stopping the vCPUs and device threads.
    pub pause: Estimate,
    /// Reading the last dirty log.
    pub dirty_log: Estimate,
    /// Sending the last pages, while the state is saved.
    pub copy: Estimate,
    /// Restoring at the target and comparing digests.
    pub prepare: Estimate,
    /// Recording the commit at the source.
    pub record: Estimate,
    /// Handing over: round trip, record at the target, starting the vCPUs.
    pub commit: Estimate,
}

impl Forecast {
    /// The forecast for stopping with `pages_left` pages to send.
    #[must_use]
    pub fn new(pages_left: u64, link: &LinkEstimate, costs: &FixedCosts) -> Self {
        let pages = link.time_for(pages_left);
        let half = |e: Estimate| Estimate::new(e.expected / 2, e.error / 2);
        Self {
            pause: costs.pause,
            dirty_log: costs.dirty_log,
            copy: sum(&[pages, half(costs.state)]),
            prepare: sum(&[half(costs.state), costs.round_trip]),
            record: costs.source_record,
            commit: sum(&[costs.round_trip, costs.target_record, costs.resume]),
        }
    }

    /// The whole downtime. Errors of parts are taken to be independent, so they add as squares.
    #[must_use]
    pub fn total(&self) -> Estimate {
        let Self { pause, dirty_log, copy, prepare, record, commit } = *self;
        sum(&[pause, dirty_log, copy, prepare, record, commit])
    }
}

fn sum(parts: &[Estimate]) -> Estimate {
    let expected = parts.iter().map(|part| part.expected).sum();
    let squares: f64 = parts.iter().map(|part| part.error.as_secs_f64().powi(2)).sum();
    Estimate::new(expected, Duration::from_secs_f64(squares.sqrt()))
}

/// What to do with the pages that the last dirty log named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest and send them: it fits the budget.
    Stop,
    /// Send them while the guest runs.
    Round,
}

/// Whether stopping now fits `budget`, with the error bars counted in.
#[must_use]
pub fn decide(forecast: &Forecast, budget: Duration) -> Decision {
    if forecast.total().upper() <= budget { Decision::Stop } else { Decision::Round }
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages and bytes need no more than 53 bits here")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn few_pages_stop_and_many_go_on() {
        let mut link = LinkEstimate::default();
        link.add_round(262_144, 1 << 30, Duration::from_secs(1));
        let costs = FixedCosts::default();
        assert_eq!(decide(&Forecast::new(10, &link, &costs), 50 * MS), Decision::Stop);
        assert_eq!(decide(&Forecast::new(262_144, &link, &costs), 50 * MS), Decision::Round);
        assert_eq!(decide(&Forecast::new(10, &link, &costs), MS), Decision::Round);
    }

    #[test]
    fn an_unsteady_link_is_trusted_less() {
        let (mut steady, mut unsteady) = (LinkEstimate::default(), LinkEstimate::default());
        for round in 0..8 {
            steady.add_round(1000, 4 << 20, 10 * MS);
            unsteady.add_round(1000, 4 << 20, if round % 2 == 0 { 5 * MS } else { 15 * MS });
        }
        assert!(unsteady.time_for(1000).error > 4 * steady.time_for(1000).error);
    }

    #[test]
    fn tiny_rounds_say_nothing_of_the_link() {
        let mut link = LinkEstimate::default();
        link.add_round(3, 3 * 4096, 20 * MS);
        assert_eq!(link, LinkEstimate::default());
    }

    #[test]
    fn the_parts_add_up() {
        let forecast = Forecast::new(1000, &LinkEstimate::default(), &FixedCosts::default());
        let parts = [
            forecast.pause,
            forecast.dirty_log,
            forecast.copy,
            forecast.prepare,
            forecast.record,
            forecast.commit,
        ];
        assert_eq!(parts.iter().map(|p| p.expected).sum::<Duration>(), forecast.total().expected);
    }
}
