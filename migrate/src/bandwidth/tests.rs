//! The pacer against the promise, in virtual time: what is asserted is what its own log says, whatever the machine does.

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn at(since_start: Duration) -> Timestamp {
    // Not at the origin, so that nothing is cut off there.
    Timestamp::from_origin(10 * SECOND + since_start)
}

/// A thread that always has more to send.
#[derive(Clone)]
struct Hungry {
    asks_at: Duration,
    mid_round: bool,
}

/// What went out, and when.
type Log = Vec<(Duration, u64)>;

/// `streams` hungry threads share a pacer for `run`: `lateness` says how late each is woken, `writing` how long each
/// write takes.
fn simulate(
    bytes_per_s: u64,
    streams: usize,
    run: Duration,
    mut lateness: impl FnMut() -> Duration,
    mut writing: impl FnMut() -> Duration,
) -> Log {
    let mut pacer = Pacer::new(bytes_per_s, at(Duration::ZERO));
    let mut threads = vec![Hungry { asks_at: Duration::ZERO, mid_round: false }; streams];
    let mut log = Vec::new();
    let bytes = piece_bytes(bytes_per_s);
    loop {
        let thread = threads.iter_mut().min_by_key(|thread| thread.asks_at).expect("one at least");
        let now = thread.asks_at;
        if now > run {
            break;
        }
        let slot = pacer.slot(bytes, thread.mid_round, at(now)).since(at(Duration::ZERO));
        let sent_at = if slot > now { slot + lateness() } else { now };
        thread.mid_round = true;
        thread.asks_at = sent_at + writing();
        log.push((sent_at, bytes));
    }
    log.sort_unstable();
    log
}

/// The most and the least bytes of any second that begins with a piece, as fractions of the rate.
fn any_second(log: &Log, bytes_per_s: u64, until: Duration) -> (f64, f64) {
    let (mut most, mut least) = (0.0f64, f64::INFINITY);
    for (index, (from, _)) in log.iter().enumerate().filter(|(_, (from, _))| *from + SECOND <= until) {
        let inside = log[index..].iter().take_while(|(time, _)| *time <= *from + SECOND);
        let bytes: u64 = inside.map(|(_, bytes)| bytes).sum();
        let fraction = bytes as f64 / bytes_per_s as f64;
        most = most.max(fraction);
        // The piece at the beginning of the second belongs to it, the one at its end may not.
        least = least.min(fraction);
    }
    (most, least)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_second_has_the_rate_within_three_percent(
        mbyte_per_s in 1u64..3_000,
        streams in 1usize..=4,
        lateness_us in proptest::collection::vec(prop_oneof![8 => 0u64..300, 1 => 0u64..12_000], 1..200),
    ) {
        let bytes_per_s = mbyte_per_s * 1_000_000;
        let mut lateness = lateness_us.iter().copied().cycle();
        let next = || Duration::from_micros(lateness.next().expect("endless"));
        let log = simulate(bytes_per_s, streams, 3 * SECOND, next, || MS / 4);
        let (most, least) = any_second(&log, bytes_per_s, 3 * SECOND);
        prop_assert!(most <= 1.03, "{most}");
        prop_assert!(least >= 0.97, "{least}");
    }

    #[test]
    fn a_write_that_takes_long_now_and_then_costs_nothing(
        mbyte_per_s in 1u64..3_000,
        every in 20usize..500,
        long_us in 0u64..12_000,
    ) {
        let bytes_per_s = mbyte_per_s * 1_000_000;
        let mut count = 0usize;
        let writes = || {
            count += 1;
            Duration::from_micros(if count.is_multiple_of(every) { long_us } else { 200 })
        };
        let log = simulate(bytes_per_s, 1, 3 * SECOND, || MS / 10, writes);
        let (most, least) = any_second(&log, bytes_per_s, 3 * SECOND);
        prop_assert!(most <= 1.03 && least >= 0.97, "{least} to {most}");
    }

    #[test]
    fn no_second_makes_up_for_a_thread_that_slept_for_long(
        mbyte_per_s in 10u64..1_000,
        streams in 1usize..=4,
        every in 300usize..2_000,
        slept_ms in 1u64..900,
    ) {
        let bytes_per_s = mbyte_per_s * 1_000_000;
        let mut wakes = 0usize;
        let next = || {
            wakes += 1;
            if wakes.is_multiple_of(every) { Duration::from_millis(slept_ms) } else { Duration::ZERO }
        };
        let log = simulate(bytes_per_s, streams, 5 * SECOND, next, || MS / 4);
        prop_assert!(any_second(&log, bytes_per_s, 5 * SECOND).0 <= 1.03);
    }

    #[test]
    fn pieces_are_the_frame_again(
        header in 0usize..100_000,
        counts in proptest::collection::vec(1u64..200, 0..5),
        limit in prop_oneof![Just(None), (4096u64..500_000).prop_map(Some)],
    ) {
        let layout = ferry_protocol::MemoryLayout::new(vec![ferry_protocol::Region { gpa: 0, bytes: 4096 * 10_000 }]).unwrap();
        let ranges: Vec<PageRange> = counts.iter().enumerate()
            .map(|(number, &count)| PageRange::new(number as u64 * 300, count, &layout).unwrap()).collect();
        let header: Vec<u8> = (0..header).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let mut pieces = Pieces::new(&header, &ranges);
        let (mut bytes, mut pages) = (Vec::new(), Vec::new());
        while let Some(piece) = pieces.next(limit) {
            prop_assert!(pages.is_empty() || piece.header.is_empty(), "bytes come before pages");
            bytes.extend_from_slice(piece.header);
            let numbers: Vec<u64> = piece.ranges.iter().flat_map(|range| range.first()..range.first() + range.count()).collect();
            prop_assert_eq!(piece.bytes, (piece.header.len() + numbers.len() * 4096) as u64);
            prop_assert!(piece.bytes < limit.unwrap_or(u64::MAX).saturating_add(4096));
            pages.extend(numbers);
        }
        let expected: Vec<u64> = ranges.iter().flat_map(|range| range.first()..range.first() + range.count()).collect();
        prop_assert_eq!((bytes, pages), (header, expected));
    }
}

#[test]
fn a_burst_after_idling_is_short() {
    let mut pacer = Pacer::new(100_000_000, at(Duration::ZERO));
    let now = at(30 * SECOND);
    let at_once = std::iter::from_fn(|| (pacer.slot(10_000, false, now) <= now).then_some(10_000u64));
    assert!(at_once.sum::<u64>() <= 500_000, "more than 5 ms of the rate");
}

#[test]
fn pieces_are_short_at_any_rate() {
    assert_eq!(piece_bytes(10_000_000), 20_000);
    assert_eq!(piece_bytes(500_000_000), 1_000_000);
    assert_eq!(piece_bytes(1), PAGE_BYTES_U64);
}

#[test]
fn a_changed_rate_holds_at_once_for_those_who_sleep() {
    let cap = BandwidthCap::new(Some(1));
    let clock = Arc::new(crate::ports::SystemClock::default());
    let bandwidth = Arc::new(Bandwidth::new(cap.clone(), clock));
    let sleeper = Arc::clone(&bandwidth);
    let thread = thread::spawn(move || {
        let mut waits = Waits::default();
        // At one byte/s the second of them would wait for more than an hour.
        (0..2).for_each(|_| sleeper.wait_for(4096, &mut waits));
        waits.total
    });
    cap.set(Some(1_000_000_000));
    assert!(thread.join().expect("it ends").as_secs() < 3_000);
    cap.set(None);
    assert_eq!(bandwidth.piece_bytes(), None);
}
