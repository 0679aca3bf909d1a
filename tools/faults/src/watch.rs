//! Watches the hearts of all guests through a fault, from outside: their report pages, read out of the memory of the processes.
//!
//! A heartbeat has a number and the tick of the host's counter at which it beat. A guest that was never doubled has one
//! history: the higher the number, the later the tick, in whatever process it was seen. Two guests that go on from one moment
//! break that, whichever of them is ahead, and so does one that is set back to what it was before. Pages that were merely copied don't:
//! they show beats of the one guest, late.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_bench::measure::guest::GuestWindow;
use ferry_guest_abi::Report;
use ferry_guest_abi::report::Stage;

use crate::host::MEMORY_MIB;
use crate::plan::Side;

const EVERY: Duration = Duration::from_millis(1);

/// A process without a guest is searched for one every so many looks.
const LOOKS_PER_SEARCH: u32 = 8;

/// A report that is read while it is written can show one beat's number with its neighbour's tick.
const TORN_BEATS: u64 = 3;

/// A heartbeat that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Where.
    pub side: Side,
    /// In which process.
    pub pid: u32,
    /// Its number.
    pub count: u64,
    /// Its tick.
    pub tsc: u64,
}

#[derive(Debug, Default)]
struct Seen {
    processes: Vec<(Side, u32)>,
    beats: Vec<Beat>,
    /// The last whole report of each process.
    reports: Vec<(u32, Report)>,
}

/// A watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn locked(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start() -> anyhow::Result<Self> {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::new(AtomicBool::new(false)));
        let (watched, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::Builder::new().name("watch".to_owned()).spawn(move || {
            let mut windows: Vec<(u32, GuestWindow)> = Vec::new();
            let mut looks = 0_u32;
            while !stopped.load(Ordering::Relaxed) {
                let processes = locked(&watched).processes.clone();
                windows.retain(|(pid, _)| processes.iter().any(|(_, watched)| watched == pid));
                for (side, pid) in processes {
                    look(&watched, &mut windows, (side, pid), looks);
                }
                looks = looks.wrapping_add(1);
                thread::sleep(EVERY);
            }
        })?;
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Watches process `pid` too.
    pub fn add(&self, side: Side, pid: u32) {
        locked(&self.seen).processes.push((side, pid));
    }

    /// Forgets everything: what comes is another guest.
    pub fn restart(&self) {
        *locked(&self.seen) = Seen::default();
    }

    /// The last report that was read in process `pid`.
    #[must_use]
    pub fn report(&self, pid: u32) -> Option<Report> {
        let seen = locked(&self.seen);
        seen.reports.iter().find(|(of, _)| *of == pid).map(|(_, report)| report.clone())
    }

    /// How many different heartbeats were seen.
    #[must_use]
    pub fn beats(&self) -> usize {
        locked(&self.seen).beats.len()
    }

    /// What shows that the guest ran twice, if anything does.
    #[must_use]
    pub fn doubled(&self) -> Option<String> {
        breach(locked(&self.seen).beats.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already.
            let _ = thread.join();
        }
    }
}

fn look(seen: &Mutex<Seen>, windows: &mut Vec<(u32, GuestWindow)>, (side, pid): (Side, u32), looks: u32) {
    let index = windows.iter().position(|(of, _)| *of == pid);
    let report = match index {
        Some(index) => {
            let report = windows[index].1.report();
            if report.is_none() {
                // The process or its guest's memory is gone.
                windows.swap_remove(index);
            }
            report
        }
        None if looks.is_multiple_of(LOOKS_PER_SEARCH) => {
            GuestWindow::find(pid, MEMORY_MIB).ok().and_then(|window| {
                let report = window.report();
                windows.push((pid, window));
                report
            })
        }
        None => None,
    };
    let Some(report) = report.filter(|report| report.stage != Stage::Booting && report.heartbeat_count > 0)
    else {
        return;
    };
    let mut seen = locked(seen);
    let beat = Beat { side, pid, count: report.heartbeat_count, tsc: report.heartbeat_tsc };
    if seen.beats.iter().rev().find(|last| last.pid == pid) != Some(&beat) {
        seen.beats.push(beat);
    }
    match seen.reports.iter_mut().find(|(of, _)| *of == pid) {
        Some((_, last)) => *last = report,
        None => seen.reports.push((pid, report)),
    }
}

/// The first beat that comes later than one with a higher number, in words.
fn breach(mut beats: Vec<Beat>) -> Option<String> {
    beats.sort_by_key(|beat| (beat.count, beat.tsc));
    // From the highest number down: the earliest tick of all beats well above.
    let mut above: Option<Beat> = None;
    let mut next = beats.len();
    for index in (0..beats.len()).rev() {
        let beat = beats[index];
        while next > 0 && beats[next - 1].count >= beat.count + TORN_BEATS {
            next -= 1;
            if above.is_none_or(|above| beats[next].tsc < above.tsc) {
                above = Some(beats[next]);
            }
        }
        if let Some(above) = above.filter(|above| above.tsc < beat.tsc) {
            return Some(format!(
                "heartbeat {} at the {} (process {}) came {} ticks after heartbeat {} at the {} (process {})",
                beat.count,
                beat.side,
                beat.pid,
                beat.tsc - above.tsc,
                above.count,
                above.side,
                above.pid
            ));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beats(of: &[(Side, u64, u64)]) -> Vec<Beat> {
        of.iter().map(|(side, count, tsc)| Beat { side: *side, pid: 1, count: *count, tsc: *tsc }).collect()
    }

    #[test]
    fn one_history_is_one_guest() {
        use Side::{Source, Target};
        // It moves at 20; the target has shown copies of older pages before.
        let moved =
            [(Source, 10, 100), (Source, 20, 200), (Target, 10, 100), (Target, 20, 200), (Target, 30, 500)];
        assert_eq!(breach(beats(&moved)), None);
        // A torn read shows a neighbour's tick.
        assert_eq!(breach(beats(&[(Source, 10, 100), (Source, 11, 99), (Source, 20, 200)])), None);
    }

    #[test]
    fn two_histories_are_two_guests() {
        use Side::{Source, Target};
        // Both go on from 20, the target later.
        let both = [(Source, 20, 200), (Source, 40, 400), (Target, 30, 410), (Source, 50, 500)];
        assert!(breach(beats(&both)).is_some());
        // It ran at the target for a while, and then went on at the source from where it had been.
        let set_back = [(Source, 20, 200), (Target, 60, 700), (Source, 30, 900)];
        let text = breach(beats(&set_back)).unwrap();
        assert!(text.contains("heartbeat 30 at the source") && text.contains("heartbeat 60"), "{text}");
        // The same number at two times.
        assert!(breach(beats(&[(Source, 20, 200), (Target, 24, 900), (Source, 27, 300)])).is_some());
    }
}
