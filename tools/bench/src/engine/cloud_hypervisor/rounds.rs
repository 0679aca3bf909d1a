//! Passes over memory, from the source's events and its log.

use std::time::Duration;

use super::events::EventFile;
use super::words::Memory;
use crate::engine::whole;
use crate::results::Round;

const PAGES_PER_MIB: f64 = 256.0;

/// The passes over memory. The source tells when it began, when each pass ended, when it stopped the guest and when it
/// began to save its state; of their sizes it tells only that of the last and of all.
pub(super) fn rounds(events: &EventFile, memory: &Memory, ordered: Duration) -> Vec<Round> {
    let first = |name| events.times(name).next();
    let begin = first("migration-started");
    let mut moments: Vec<Duration> =
        begin.into_iter().chain(events.times("migration-memory-iteration")).collect();
    let passes = u32::try_from(moments.len()).unwrap_or(u32::MAX);
    let stop = (first("paused"), first("snapshotting"));
    let (Some(stopped), Some(saving)) = stop else { return Vec::new() };
    if f64::from(passes) != memory.passes {
        // Another version with other events: rather no rounds than wrong ones.
        return Vec::new();
    }
    let pages = |mib: f64| Some(whole(mib * PAGES_PER_MIB));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let round = |number: u32, from: Duration, to: Duration| {
        let sent_pages = match number {
            last if last == passes => pages(memory.stopped_mib),
            1 if passes == 2 => pages(memory.total_mib - memory.stopped_mib),
            _ => None,
        };
        let (from_ms, took_ms) = (ms(from.saturating_sub(ordered)), ms(to.saturating_sub(from)));
        Round {
            round: number,
            from_ms: Some(from_ms),
            ms: Some(took_ms),
            dirty_pages: sent_pages,
            sent_pages,
            wire_bytes: None,
            forecast_upper_ms: None,
        }
    };
    // What lies between the last pass and the stop is neither.
    moments.extend([stopped, saving]);
    let spans = moments.windows(2).enumerate().filter(|(index, _)| *index + 3 != moments.len());
    (1..).zip(spans).map(|(number, (_, span))| round(number, span[0], span[1])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_lab::LabClock;

    fn events(names: &[(&str, u64)]) -> EventFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let object = |(name, ms): &(&str, u64)| {
            let nanos = ms * 1_000_000;
            format!("{{ \"timestamp\": {{ \"secs\": 0, \"nanos\": {nanos} }}, \"event\": \"{name}\" }}\n")
        };
        std::fs::write(&path, names.iter().map(object).collect::<String>()).unwrap();
        let mut events = EventFile::at(&path);
        let clock = LabClock::start();
        // The events are of the past, as they are for those who read a file.
        std::thread::sleep(Duration::from_millis(130));
        events.read(clock).unwrap();
        events
    }

    fn memory(passes: f64) -> Memory {
        Memory { passes, stopped_mib: 2.0, total_mib: 130.0, forecast_ms: None }
    }

    const NAMES: [(&str, u64); 6] = [
        ("booted", 1),
        ("migration-started", 10),
        ("migration-memory-iteration", 110),
        ("pausing", 112),
        ("paused", 115),
        ("snapshotting", 118),
    ];

    #[test]
    fn passes_lie_between_events() {
        let events = events(&NAMES);
        let ordered = events.times("booted").next().unwrap();
        let seen: Vec<_> = rounds(&events, &memory(2.0), ordered)
            .into_iter()
            .map(|round| {
                (round.round, round.from_ms.map(f64::round), round.ms.map(f64::round), round.sent_pages)
            })
            .collect();
        let first = (1, Some(9.0), Some(100.0), Some(128 * 256));
        assert_eq!(seen, [first, (2, Some(114.0), Some(3.0), Some(512))]);
    }

    #[test]
    fn with_more_passes_only_the_size_of_the_last_is_known() {
        let mut names = NAMES.to_vec();
        names.insert(3, ("migration-memory-iteration", 111));
        let sizes: Vec<_> = rounds(&events(&names), &memory(3.0), Duration::ZERO)
            .into_iter()
            .map(|round| (round.round, round.sent_pages))
            .collect();
        assert_eq!(sizes, [(1, None), (2, None), (3, Some(512))]);
    }

    #[test]
    fn rather_no_rounds_than_wrong_ones() {
        assert_eq!(rounds(&events(&NAMES), &memory(3.0), Duration::ZERO), []);
        assert_eq!(rounds(&events(&NAMES[..4]), &memory(2.0), Duration::ZERO), []);
    }
}
