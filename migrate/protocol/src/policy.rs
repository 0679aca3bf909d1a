//! When to stop the guest: forecasts of downtime and the decision they lead to. Pure functions of what was
//! measured; nothing here remembers anything but the estimators [`LinkEstimate`] and [`Cost`].
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

/// A mean and a mean deviation that forget, as RFC 6298 estimates round trips: what was measured `n` samples ago counts
/// for `2^-n`. Conditions change, and the standstill resembles the last moments before it most.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Smoothed {
    mean: f64,
    deviation: f64,
}

/// The weight of the newest sample.
const NEWEST_WEIGHT: f64 = 0.5;

impl Smoothed {
    fn take_in(&mut self, sample: f64) {
        let Self { mean, deviation } = *self;
        *self = Self {
            mean: mean + NEWEST_WEIGHT * (sample - mean),
            deviation: deviation + NEWEST_WEIGHT * ((sample - mean).abs() - deviation),
        };
    }
}

/// Something that is measured again and again before it counts: assumed at first, forgotten by halves afterwards, so
/// that one slow sample passes away within some rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    assumed: Estimate,
    measured_s: Option<Smoothed>,
}

impl Cost {
    /// What is taken to be true until something is measured.
    #[must_use]
    pub const fn assumed(estimate: Estimate) -> Self {
        Self { assumed: estimate, measured_s: None }
    }

    /// Takes in a measurement. The first stands alone, with half of it as its error (RFC 6298).
    pub fn add(&mut self, took: Duration) {
        let sample = took.as_secs_f64();
        match &mut self.measured_s {
            Some(smoothed) => smoothed.take_in(sample),
            None => self.measured_s = Some(Smoothed { mean: sample, deviation: sample / 2.0 }),
        }
    }

    /// What it will cost next.
    #[must_use]
    pub fn estimate(&self) -> Estimate {
        self.measured_s.map_or(self.assumed, |Smoothed { mean, deviation }| {
            Estimate::new(Duration::from_secs_f64(mean), Duration::from_secs_f64(deviation))
        })
    }
}

/// How long a page that is not zero takes from being chosen to having arrived, measured round by round.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkEstimate {
    page_us: Option<Smoothed>,
    bytes_per_s: f64,
}

/// Rounds with fewer pages say more of the round trip than of the link.
const PAGES_FOR_AN_ESTIMATE: u64 = 256;

/// What a page is taken to need before anything was measured: a link of 100 MB/s.
const PAGE_PRIOR: Duration = Duration::from_micros(40);

/// How far off the mean of one round alone may be, relative to it: its pages average out among themselves (with the root
/// of their number), but not what the whole round had in common, such as what else ran meanwhile.
fn first_deviation(pages: u64) -> f64 {
    (4.0 / float(pages).sqrt()).clamp(1.0 / 16.0, 1.0 / 4.0)
}

impl LinkEstimate {
    /// Takes in a round that moved `pages` pages (not counting zero pages) as `wire_bytes` in `took`. Time in which a
    /// bandwidth cap kept the link idle does not belong into `took`: the last round is sent without the cap.
    pub fn add_round(&mut self, pages: u64, wire_bytes: u64, took: Duration) {
        if pages < PAGES_FOR_AN_ESTIMATE || took.is_zero() {
            return;
        }
        self.bytes_per_s = float(wire_bytes) / took.as_secs_f64();
        let page_us = took.as_secs_f64() * 1e6 / float(pages);
        match &mut self.page_us {
            Some(smoothed) => smoothed.take_in(page_us),
            None => {
                let deviation = page_us * first_deviation(pages);
                self.page_us = Some(Smoothed { mean: page_us, deviation });
            }
        }
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
///
/// Pausing, saving, restoring and starting can't be rehearsed without touching the guest: a vCPU's state is only readable
/// while it does not run. They stay as assumed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedCosts {
    /// Stopping the vCPUs and device threads.
    pub pause: Cost,
    /// Reading the last dirty log.
    pub dirty_log: Cost,
    /// Saving the state at the source and restoring it at the target.
    pub state: Cost,
    /// One round trip on the control connection.
    pub round_trip: Cost,
    /// Writing the durable record at the source.
    pub source_record: Cost,
    /// Writing the durable record at the target.
    pub target_record: Cost,
    /// Starting the vCPUs at the target.
    pub resume: Cost,
    /// Reading all of memory once more, where that is wanted.
    pub whole: Cost,
}

/// What reading a page once more for its digest takes to be true, in ns: 10 GiB/s, within a factor of two.
const WHOLE_PAGE_NS: u64 = 400;

impl FixedCosts {
    /// All of the paused guest's memory will be read once more, of which `pages` may hold something.
    pub fn expect_whole(&mut self, pages: u64) {
        let expected = Duration::from_nanos(pages.saturating_mul(WHOLE_PAGE_NS));
        self.whole = Cost::assumed(Estimate::new(expected, expected / 2));
    }
}

const fn ms(expected: u64, error: u64) -> Cost {
    Cost::assumed(Estimate::new(Duration::from_millis(expected), Duration::from_millis(error)))
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
            whole: ms(0, 0),
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
        let state = costs.state.estimate();
        let half = Estimate::new(state.expected / 2, state.error / 2);
        let round_trip = costs.round_trip.estimate();
        Self {
            pause: costs.pause.estimate(),
            dirty_log: costs.dirty_log.estimate(),
            copy: sum(&[pages, half, costs.whole.estimate()]),
            prepare: sum(&[half, round_trip]),
            record: costs.source_record.estimate(),
            commit: sum(&[round_trip, costs.target_record.estimate(), costs.resume.estimate()]),
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

/// Whether a durable record is to be written once more while a round of `round` is sent, to measure anew what it costs:
/// where that hides behind the round, or where the fixed costs alone keep the guest from being stopped (`blocked`), so
/// that only a new measurement can help.
#[must_use]
pub fn is_rehearsal_due(cost: &Cost, round: Duration, blocked: bool) -> bool {
    blocked || round >= 4 * cost.estimate().expected
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages and bytes need no more than 53 bits here")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, proptest};

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
    fn a_round_of_many_pages_is_trusted_more_than_one_of_few() {
        let error = |pages: u64| {
            let mut link = LinkEstimate::default();
            link.add_round(pages, pages * 4096, Duration::from_micros(10 * pages));
            link.time_for(1000).error
        };
        assert_eq!(error(256), Duration::from_micros(2500));
        assert_eq!(error(1024), Duration::from_micros(1250));
        assert_eq!(error(262_144), Duration::from_micros(625));
    }

    #[test]
    fn rehearsals_hide_behind_rounds_unless_they_are_what_is_waited_for() {
        let mut disk = Cost::assumed(Estimate::new(2 * MS, MS));
        assert!(is_rehearsal_due(&disk, 8 * MS, false) && !is_rehearsal_due(&disk, 7 * MS, false));
        disk.add(100 * MS);
        assert!(!is_rehearsal_due(&disk, 8 * MS, false) && is_rehearsal_due(&disk, Duration::ZERO, true));
    }

    proptest! {
        /// Whatever was measured before, some normal measurements later it no longer counts.
        #[test]
        fn a_cost_recovers(slow_ms in proptest::collection::vec(0u32..10_000, 1..20), normal_us in 1u32..5_000) {
            let mut cost = Cost::assumed(Estimate::new(MS, MS));
            slow_ms.iter().for_each(|&slow| cost.add(slow * MS));
            let normal = Duration::from_micros(normal_us.into());
            (0..16).for_each(|_| cost.add(normal));
            let off = cost.estimate().upper().abs_diff(normal);
            prop_assert!(off < 8 * MS, "{off:?}");
        }

        /// A slow measurement counts at once: nothing is averaged away before it is known to be over.
        #[test]
        fn a_cost_is_wary(normal_us in proptest::collection::vec(1u32..5_000, 1..20), slow_ms in 20u32..10_000) {
            let mut cost = Cost::assumed(Estimate::new(MS, MS));
            normal_us.iter().for_each(|&us| cost.add(Duration::from_micros(us.into())));
            cost.add(slow_ms * MS);
            prop_assert!(cost.estimate().upper() >= slow_ms * MS);
        }
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
