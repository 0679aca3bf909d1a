//! Turns what was seen of a run into its result.

use super::Seen;
use crate::engine::{Ending, Pair};
use crate::measure::cost;
use crate::measure::sampler::Samples;
use crate::results::{Check, ClientSeen, Measures, Outcome, ProcessCost, Run, Timeline};

/// Fills in outcome, measures and timeline of `run`.
pub(super) fn fill_in(
    run: &mut Run,
    seen: &Seen,
    samples: &Samples,
    clients: Option<(ClientSeen, Vec<(f64, f64)>)>,
    pair: &dyn Pair,
) {
    let engine = &seen.engine;
    run.outcome = match &engine.ending {
        Ending::Moved if seen.heartbeat_before.is_some() && samples.last_target.is_none() => {
            Outcome::Failed {
                reason: "the engine says that the guest has moved, but its heart does not beat at the target"
                    .to_owned(),
            }
        }
        Ending::Moved => Outcome::Moved,
        Ending::NotConverged => Outcome::NotConverged,
        Ending::Failed(reason) => Outcome::Failed { reason: reason.clone() },
    };
    let origin_ms = engine.ordered.as_secs_f64() * 1e3;
    let total_ms = engine.done.saturating_sub(engine.ordered).as_secs_f64() * 1e3;
    let gap = seen.heartbeat_before.and_then(|tick| samples.longest_gap_since(tick));
    let (client, client_rates) = clients.map_or((None, Vec::new()), |(seen, rates)| (Some(seen), rates));
    let pids = [pair.source_pid(), pair.target_pid()];
    let costs = pids.iter().zip(&seen.costs).enumerate().map(|(index, (pid, (before, after)))| {
        let cost = cost::between(Seen::role(index), *pid, before, after, |thread| pair.is_vcpu(thread));
        ProcessCost { guest_memory_bytes: seen.guest_memory[index], ..cost }
    });
    let writes = samples.guest.last().is_some_and(|moment| moment.pages_written > 0);
    let end = samples.guest.last().map_or(engine.done, |moment| moment.at);
    let rate = |from, to| if writes { samples.guest_rate(from, to) } else { None };
    run.measures = Measures {
        total_ms: Some(total_ms),
        downtime_guest_ms: gap.map(|(ms, _)| ms),
        downtime_engine_ms: engine.downtime_ms,
        downtime_parts: engine.downtime_parts.clone(),
        downtime_forecast_ms: engine.forecast_ms,
        client,
        wire_bytes: seen.wire_bytes,
        wire_bytes_engine: engine.wire_bytes,
        processes: costs.collect(),
        guest_pages_per_s_before: rate(std::time::Duration::ZERO, engine.ordered),
        guest_pages_per_s_during: rate(engine.ordered, engine.done),
        guest_pages_per_s_after: rate(engine.done, end),
        rounds: engine.rounds.clone(),
        round_count: engine.round_count,
        check: check(seen, samples),
        idleness: seen.idleness(),
        more: engine.more.iter().cloned().collect(),
    };
    // Clients have waited for the guest long before that.
    let begin_ms = samples.wire.first().map_or(0.0, |(at, _)| at.as_secs_f64() * 1e3 - origin_ms);
    run.timeline = Timeline {
        done_ms: Some(total_ms),
        standstill: gap.map(|(ms, from)| (from - origin_ms, from - origin_ms + ms)),
        link_bytes_per_s: samples.wire_rates(engine.ordered),
        guest_pages_per_s: if writes { samples.guest_rates(engine.ordered) } else { Vec::new() },
        client_bytes_per_s: client_rates
            .into_iter()
            .map(|(ms, rate)| (ms - origin_ms, rate))
            .filter(|(ms, _)| *ms >= begin_ms)
            .collect(),
        dirty_pages: engine.dirty_pages.clone(),
    };
}

fn check(seen: &Seen, samples: &Samples) -> Check {
    let (first, last) = (samples.first_target.as_ref(), samples.last_target.as_ref());
    let checked = first.zip(last).map(|(first, last)| {
        (last.pages_checked + last.fill_checked).saturating_sub(first.pages_checked + first.fill_checked)
    });
    Check {
        alive: last.is_some(),
        errors: last.map(|report| report.errors),
        pages_checked: checked,
        digest_equal: seen.engine.digest_equal,
    }
}
