//! Starting and parking a machine's threads together, and what they report.
//!
//! ```text
//!             run()                     pause(): wanted = Park, kick each thread
//!  parked ─────────────► running ──────────────────────────────────► parked (counted)
//!    │                      │  the guest ends itself: wanted = Park, for all
//!    └──── stop() ──────────┴──► gone
//! ```
//!
//! A thread is either inside [`Control::park`], and then counted as parked, or it may touch the guest.
//! `pause` returns when all are counted. A kick can't be lost: a thread resets its kick flag under the
//! same lock, at the moment when it learns that it may run, so every later wish to park comes with a
//! kick that is still standing.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Events that a machine keeps for its owner; there are fewer causes than this in a machine's life.
const EVENTS_MAX: usize = 16;

/// What a machine reports on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset, by the keyboard controller or a triple fault.
    Reset,
    /// A vCPU can't go on.
    Fault {
        /// Which one.
        vcpu: u8,
        /// What KVM reported.
        reason: String,
    },
}

/// What the threads of a machine are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Exit,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// Threads inside `park`, or gone.
    parked: usize,
    threads: usize,
    /// How the guest ended itself, once it has.
    ended: Option<MachineEvent>,
    events: VecDeque<MachineEvent>,
}

/// Makes a thread come to [`Control::park`] soon.
pub(crate) trait Kick: Send + Sync {
    /// Called with the control's lock held, after the wish changed.
    fn kick(&self);
    /// Called with the control's lock held, when the thread is about to run.
    fn reset(&self);
}

/// The common control of a machine's threads.
pub(crate) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// Set once, before the first run.
    kicks: OnceLock<Vec<Arc<dyn Kick>>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn new() -> Self {
        let state =
            State { wanted: Wanted::Park, parked: 0, threads: 0, ended: None, events: VecDeque::new() };
        Self { state: Mutex::new(state), changed: Condvar::new(), kicks: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a thread that is about to be spawned.
    pub(crate) fn add_thread(&self) {
        self.lock().threads += 1;
    }

    /// Takes back a count whose thread could not be spawned.
    pub(crate) fn remove_thread(&self) {
        self.lock().threads -= 1;
    }

    /// Names the kicks of all threads.
    pub(crate) fn set_kicks(&self, kicks: Vec<Arc<dyn Kick>>) {
        assert!(self.kicks.set(kicks).is_ok(), "kicks are set once");
    }

    /// Called by a thread that does not touch the guest now: waits until it may (true) or must end
    /// (false).
    pub(crate) fn park(&self, kick: &dyn Kick) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        loop {
            match state.wanted {
                Wanted::Park => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Wanted::Run => {
                    state.parked -= 1;
                    kick.reset();
                    return true;
                }
                // It stays counted: a thread that is gone touches nothing.
                Wanted::Exit => return false,
            }
        }
    }

    /// Whether a running thread should come to [`Control::park`].
    pub(crate) fn should_park(&self) -> bool {
        self.lock().wanted != Wanted::Run
    }

    /// Blocks a thread that has nothing it can do until it should park.
    pub(crate) fn wait_for_wish_to_park(&self) {
        let state = self.lock();
        let waited = self.changed.wait_while(state, |state| state.wanted == Wanted::Run);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Lets the threads run; false if the guest has ended itself.
    pub(crate) fn run(&self) -> bool {
        let mut state = self.lock();
        if state.ended.is_some() || state.wanted == Wanted::Exit {
            return false;
        }
        state.wanted = Wanted::Run;
        self.changed.notify_all();
        true
    }

    /// Returns when every thread is parked.
    pub(crate) fn pause(&self) {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Park;
            self.kick_all();
            self.changed.notify_all();
        }
        while state.parked < state.threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has every thread leave; the caller joins them.
    pub(crate) fn exit(&self) {
        let mut state = self.lock();
        state.wanted = Wanted::Exit;
        self.kick_all();
        drop(state);
        self.changed.notify_all();
    }

    /// The guest has ended itself: every thread parks, and the owner is told.
    pub(crate) fn end(&self, event: MachineEvent) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.ended = Some(event.clone());
        }
        if state.wanted == Wanted::Run {
            state.wanted = Wanted::Park;
            self.kick_all();
        }
        if state.events.len() < EVENTS_MAX {
            state.events.push_back(event);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// How the guest ended itself, if it has.
    pub(crate) fn ended(&self) -> Option<MachineEvent> {
        self.lock().ended.clone()
    }

    /// The next event, waiting at most `timeout` for one.
    pub(crate) fn next_event(&self, timeout: Duration) -> Option<MachineEvent> {
        let state = self.lock();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, timeout, |state| state.events.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.events.pop_front()
    }

    /// A thread of the machine has panicked: it counts as parked for good, and the machine is faulty.
    fn abandon(&self, vcpu: u8, what: &str) {
        self.lock().parked += 1;
        self.end(MachineEvent::Fault { vcpu, reason: format!("its {what} thread panicked: a bug in ferry") });
    }

    fn kick_all(&self) {
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kick();
        }
    }
}

/// Held by a thread outside [`Control::park`], so that a panic makes a faulty machine and not a pause
/// that never returns.
#[derive(Debug)]
pub(crate) struct PanicGuard {
    pub(crate) control: Arc<Control>,
    /// The vCPU that the fault is reported for.
    pub(crate) vcpu: u8,
    /// What the thread does.
    pub(crate) what: &'static str,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.control.abandon(self.vcpu, self.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    use super::*;

    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Kick for Flag {
        fn kick(&self) {
            self.0.store(true, Ordering::SeqCst);
        }

        fn reset(&self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    #[test]
    fn no_thread_moves_between_pause_and_run() {
        let control = Arc::new(Control::new());
        let count = Arc::new(AtomicU64::new(0));
        let flags: Vec<Arc<Flag>> = (0..3).map(|_| Arc::default()).collect();
        control.set_kicks(flags.iter().map(|flag| Arc::clone(flag) as Arc<dyn Kick>).collect());
        let threads: Vec<_> = flags
            .into_iter()
            .map(|flag| {
                control.add_thread();
                let (control, count) = (Arc::clone(&control), Arc::clone(&count));
                thread::spawn(move || {
                    while control.park(&*flag) {
                        while !flag.0.load(Ordering::SeqCst) {
                            // Work under way when the kick comes, as a device access is.
                            (0..1000).for_each(|_| std::hint::spin_loop());
                            count.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for round in 0..500 {
            assert!(control.run());
            if round % 3 == 0 {
                thread::yield_now();
            }
            control.pause();
            let before = count.load(Ordering::SeqCst);
            thread::sleep(Duration::from_micros(100));
            assert_eq!(count.load(Ordering::SeqCst), before, "round {round}");
        }
        control.exit();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(count.load(Ordering::SeqCst) > 0);
    }

    #[test]
    fn a_panicked_thread_is_a_fault_and_does_not_block_a_pause() {
        let control = Arc::new(Control::new());
        let flag = Arc::new(Flag::default());
        control.set_kicks(vec![Arc::clone(&flag) as Arc<dyn Kick>]);
        control.add_thread();
        let for_thread = Arc::clone(&control);
        let thread = thread::spawn(move || {
            let control = Arc::clone(&for_thread);
            let _guard = PanicGuard { control: for_thread, vcpu: 3, what: "vCPU" };
            assert!(control.park(&*flag));
            panic!("on purpose");
        });
        assert!(control.run());
        assert!(thread.join().is_err());
        control.pause();
        let event = control.next_event(Duration::ZERO);
        assert!(matches!(event, Some(MachineEvent::Fault { vcpu: 3, .. })), "{event:?}");
        assert!(!control.run());
    }

    #[test]
    fn a_guest_that_ended_does_not_run_again() {
        let control = Control::new();
        assert_eq!(control.next_event(Duration::ZERO), None);
        assert!(control.run());
        control.end(MachineEvent::Reset);
        assert!(!control.run());
        assert_eq!(control.ended(), Some(MachineEvent::Reset));
        assert_eq!(control.next_event(Duration::ZERO), Some(MachineEvent::Reset));
        assert_eq!(control.next_event(Duration::ZERO), None);
    }
}
