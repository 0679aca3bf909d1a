//! A machine's clocks when it moves: KVM's paravirtual clock, and the TSC by it.
//!
//! With [`ClockMode::Realtime`] both go on by the time that passed from saving to restoring, which the two hosts' wall clocks tell.
//! They are believed as far as they fit what the target measured itself since the source told it that it
//! pauses; otherwise that is taken, and said. With [`ClockMode::Monotonic`] both go on from where they were when the guest was
//! paused, and are set once more in the moment in which it runs. Either way they never go back.
//!
//! How a TSC follows KVM's clock is the algorithm of the kernel's Documentation/virt/kvm/devices/vcpu.rst, section 4.1.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::Cap;
use nix::time::{ClockId, clock_gettime};

use super::Machine;
use crate::capability::KvmCallError;
use crate::config::ClockMode;
use crate::cpu::is_same_tsc;
use crate::saved::StateError;
use crate::saved::sections::{Clock, HostInstant, Vcpu as SavedVcpu};
use crate::vcpu::{self, TimedState, TscPlan};

/// How far the wall clocks of two hosts may differ before their word counts for nothing. Hosts that are synchronised at all are
/// within milliseconds; a guest's clock then jumps ahead by no more than this.
const SKEW_MAX: Duration = Duration::from_secs(1);

/// What a machine remembers of time while it moves.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    /// The clock when the guest was last paused, if it has not run since and is to stand still.
    paused: Option<Clock>,
    /// By the host's monotonic clock, when the source told that it pauses.
    source_paused: Option<Duration>,
    /// What a guest whose clocks stand still has to be given again when it first runs here.
    standing: Option<(Clock, Vec<TimedState>)>,
}

/// Why the hosts' wall clocks were not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// By them, the state was saved after it was restored.
    Backwards { by_ns: u64 },
    /// By them, much more time passed than did.
    TooLong { ns: u64, measured_ns: u64 },
}

/// How long it took from saving to restoring, by the hosts' wall clocks (`wall_ns`, if both are known) and by the target alone (if it was
/// told when the source paused, which is at most a little before saving).
fn passed(wall_ns: Option<i128>, measured_ns: Option<u64>) -> (u64, Option<Doubt>) {
    let Some(wall_ns) = wall_ns else { return (measured_ns.unwrap_or(0), None) };
    let Ok(ns) = u64::try_from(wall_ns) else {
        let by_ns = u64::try_from(-wall_ns).unwrap_or(u64::MAX);
        return (measured_ns.unwrap_or(0), Some(Doubt::Backwards { by_ns }));
    };
    let skew_ns = u64::try_from(SKEW_MAX.as_nanos()).expect("a second");
    match measured_ns {
        Some(measured_ns) if ns > measured_ns.saturating_add(skew_ns) => {
            (measured_ns, Some(Doubt::TooLong { ns, measured_ns }))
        }
        Some(_) | None => (ns, None),
    }
}

impl Machine {
    /// The guest has been paused.
    pub(super) fn note_pause(&self) {
        if self.config.clock == ClockMode::Monotonic {
            self.clocks().paused = self.read_clock().ok();
        }
    }

    /// The source has told that it pauses its guest.
    pub(super) fn note_source_pause(&self) {
        self.clocks().source_paused = read(ClockId::CLOCK_MONOTONIC);
    }

    /// The clock that is to be saved, and by how many ns what is read of TSCs now is ahead of it.
    pub(super) fn clock_to_save(&self) -> Result<(Clock, u64), StateError> {
        self.set_standing_clocks()?;
        let now = self.read_clock()?;
        let paused = self.clocks().paused.clone();
        Ok(match paused {
            Some(paused) => {
                let ahead_ns = now.guest_ns.saturating_sub(paused.guest_ns);
                (paused, ahead_ns)
            }
            None => (now, 0),
        })
    }

    fn read_clock(&self) -> Result<Clock, StateError> {
        let now = self.vm.get_clock().map_err(KvmCallError::new("read its clock"))?;
        let realtime_ns = read(ClockId::CLOCK_REALTIME).and_then(|time| u64::try_from(time.as_nanos()).ok());
        // Whether the host's frequency is stable was found out when the machine was built, before a guest brought its own.
        Ok(Clock { guest_ns: now.clock, host: host_instant(&now), host_tsc_khz: self.tsc_khz, realtime_ns })
    }

    /// Sets the guest's clock to what it is to be now, and says how TSCs follow.
    pub(super) fn restore_clock(&self, saved: &Clock, vcpus: &[SavedVcpu]) -> Result<TscPlan, StateError> {
        let tsc_khz = vcpus.first().and_then(|vcpu| vcpu.tsc_khz);
        match self.config.clock {
            ClockMode::Monotonic => {
                let timed = vcpus.iter().map(TimedState::of).collect();
                self.clocks().standing = Some((saved.clone(), timed));
                self.set_clock(saved.guest_ns, None)?;
            }
            ClockMode::Realtime => self.set_clock_by_wall(saved)?,
        }
        Ok(tsc_plan(saved, &self.read_clock()?, tsc_khz))
    }

    fn set_clock_by_wall(&self, saved: &Clock) -> Result<(), StateError> {
        let Clock { guest_ns, host, host_tsc_khz: _, realtime_ns } = saved;
        let then_ns = host.map(|host| host.realtime_ns).or(*realtime_ns);
        let now = read(ClockId::CLOCK_REALTIME);
        let wall_ns = then_ns.zip(now).map(|(then, now)| nanoseconds(now) - i128::from(then));
        let measured_ns = self.source_paused_ns_ago();
        let (passed_ns, doubt) = passed(wall_ns, measured_ns);
        if let Some(doubt) = doubt {
            tracing::warn!(?doubt, taken_ns = passed_ns, "{}", doubt.in_words());
        }
        let now_ns = now.and_then(|now| u64::try_from(now.as_nanos()).ok());
        let since = if doubt.is_none() { then_ns } else { now_ns.map(|now| now.saturating_sub(passed_ns)) };
        match since {
            // KVM adds what has passed by the moment in which it sets its clock.
            Some(since) if self.clock_flags() & KVM_CLOCK_REALTIME != 0 => {
                self.set_clock(*guest_ns, Some(since))
            }
            Some(_) | None => self.set_clock(guest_ns.saturating_add(passed_ns), None),
        }
    }

    /// Sets clocks that stand still back to where they were, if the guest has not run here.
    pub(super) fn set_standing_clocks(&self) -> Result<(), StateError> {
        let clocks = self.clocks();
        let Some((saved, timed)) = &clocks.standing else { return Ok(()) };
        self.set_clock(saved.guest_ns, None)?;
        let tsc_khz = timed.first().and_then(|timed| timed.khz);
        let plan = tsc_plan(saved, &self.read_clock()?, tsc_khz);
        for (vcpu, timed) in self.vcpus.iter().zip(timed) {
            vcpu::set_time(&vcpu.lock(), timed, plan)?;
        }
        Ok(())
    }

    /// The guest runs from now on.
    pub(super) fn clocks_run(&self) {
        if let Err(error) = self.set_standing_clocks() {
            // They have gone on since the state was restored, which is late by some milliseconds and not wrong.
            tracing::warn!(%error, "the guest's clocks went on while it was handed over");
        }
        *self.clocks() = Clocks::default();
    }

    fn source_paused_ns_ago(&self) -> Option<u64> {
        let then = self.clocks().source_paused?;
        u64::try_from(read(ClockId::CLOCK_MONOTONIC)?.checked_sub(then)?.as_nanos()).ok()
    }

    fn set_clock(&self, guest_ns: u64, since_realtime_ns: Option<u64>) -> Result<(), StateError> {
        let clock = kvm_clock_data {
            clock: guest_ns,
            flags: if since_realtime_ns.is_some() { KVM_CLOCK_REALTIME } else { 0 },
            realtime: since_realtime_ns.unwrap_or(0),
            ..kvm_clock_data::default()
        };
        Ok(self.vm.set_clock(&clock).map_err(KvmCallError::new("set its clock"))?)
    }

    fn clock_flags(&self) -> u32 {
        u32::try_from(self.vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0)
    }

    fn clocks(&self) -> MutexGuard<'_, Clocks> {
        self.clocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Doubt {
    fn in_words(self) -> String {
        match self {
            Self::Backwards { by_ns } => format!(
                "by the hosts' wall clocks the guest's state was restored {} ms before it was saved; its clocks go on by \
                 the downtime that was measured here: synchronise the hosts",
                by_ns / 1_000_000
            ),
            Self::TooLong { ns, measured_ns } => format!(
                "by the hosts' wall clocks the guest stood still for {} ms, and {} ms were measured here, by which its \
                 clocks go on: synchronise the hosts",
                ns / 1_000_000,
                measured_ns / 1_000_000
            ),
        }
    }
}

fn read(clock: ClockId) -> Option<Duration> {
    clock_gettime(clock).ok().map(Duration::from)
}

fn nanoseconds(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

/// How TSCs follow the clock, which was `then` and is `now`. An offset is only one to the host's TSC if
/// nothing is scaled, so both hosts and the guest must agree on the frequency.
fn tsc_plan(then: &Clock, now: &Clock, guest_khz: Option<u32>) -> TscPlan {
    let passed_ns = now.guest_ns.saturating_sub(then.guest_ns);
    let offset_change = match (then, now, guest_khz) {
        (
            Clock { host: Some(before), host_tsc_khz: Some(before_khz), guest_ns: _, realtime_ns: _ },
            Clock { host: Some(after), host_tsc_khz: Some(after_khz), guest_ns: _, realtime_ns: _ },
            Some(khz),
        ) if is_same_tsc(*before_khz, khz) && is_same_tsc(*after_khz, khz) => {
            Some(tsc_offset_change(then.guest_ns, now.guest_ns, before.tsc, after.tsc, khz))
        }
        _ => None,
    };
    TscPlan { offset_change, passed_ns }
}

/// The host's clocks, where KVM gave both.
fn host_instant(clock: &kvm_clock_data) -> Option<HostInstant> {
    let both = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    (clock.flags & both == both).then_some(HostInstant { realtime_ns: clock.realtime, tsc: clock.host_tsc })
}

/// What to add to a vCPU's TSC offset so that its TSC goes on by as much time as its clock did: off₁ =
/// off₀ + (k₁ − k₀) · freq + (t₀ − t₁), from the kernel's Documentation/virt/kvm/devices/vcpu.rst. All
/// modulo 2^64.
fn tsc_offset_change(
    guest_before_ns: u64,
    guest_after_ns: u64,
    tsc_before: u64,
    tsc_after: u64,
    khz: u32,
) -> u64 {
    let passed_ns = i128::from(guest_after_ns) - i128::from(guest_before_ns);
    let cycles = passed_ns * i128::from(khz) / 1_000_000;
    let change = cycles + i128::from(tsc_before) - i128::from(tsc_after);
    // Reducing modulo 2^64 is what the hardware does with the offset.
    u64::try_from(change.rem_euclid(1 << 64)).expect("reduced modulo 2^64")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_clocks_are_believed_as_far_as_they_fit_what_was_measured() {
        let second = 1_000_000_000;
        assert_eq!(passed(Some(40_000_000), Some(50_000_000)), (40_000_000, None));
        assert_eq!(passed(Some(40_000_000), None), (40_000_000, None));
        // A state that was kept for a day: nobody has told when its guest was paused.
        assert_eq!(passed(Some(86_400 * i128::from(second)), None), (86_400 * second, None));
        assert_eq!(passed(None, Some(7)), (7, None));
        assert_eq!(passed(None, None), (0, None));
        let doubt = Some(Doubt::Backwards { by_ns: 5 });
        assert_eq!(passed(Some(-5), Some(50_000_000)), (50_000_000, doubt));
        assert_eq!(passed(Some(-5), None), (0, doubt));
        let doubt = Doubt::TooLong { ns: 3_600 * second, measured_ns: 50_000_000 };
        assert_eq!(passed(Some(3_600 * i128::from(second)), Some(50_000_000)), (50_000_000, Some(doubt)));
        assert!(doubt.in_words().contains("3600000 ms") && doubt.in_words().contains("50 ms"));
    }

    #[test]
    fn the_tsc_goes_on_by_the_time_that_passed() {
        // 2 s passed at 3 GHz; the target's TSC is 10^12 ahead.
        let (before, after) = (5_000_000_u64, 1_000_005_000_000_u64 + 123);
        let change = tsc_offset_change(1_000, 2_000_001_000, before, after, 3_000_000);
        let offset_before = 42_u64.wrapping_neg();
        let guest_before = before.wrapping_add(offset_before);
        let guest_after = after.wrapping_add(offset_before).wrapping_add(change);
        assert_eq!(guest_after - guest_before, 6_000_000_000);
    }

    #[test]
    fn offsets_are_only_kept_between_equal_frequencies() {
        let clock = |guest_ns, tsc, host_tsc_khz| Clock {
            guest_ns,
            host: Some(HostInstant { realtime_ns: 0, tsc }),
            host_tsc_khz,
            realtime_ns: None,
        };
        let plan = |before_khz, after_khz, guest_khz| {
            tsc_plan(&clock(1_000, 50, before_khz), &clock(2_000_001_000, 90, after_khz), guest_khz)
        };
        let same = plan(Some(3_000_000), Some(3_000_700), Some(3_000_000));
        assert_eq!(same.offset_change, Some(6_000_000_000 + 50 - 90));
        for (before_khz, after_khz, guest_khz) in [
            (Some(3_000_000), Some(3_001_000), Some(3_000_000)),
            (Some(2_000_000), Some(3_000_000), Some(3_000_000)),
            (Some(3_000_000), Some(3_000_000), Some(2_000_000)),
            (None, Some(3_000_000), Some(3_000_000)),
            (Some(3_000_000), Some(3_000_000), None),
        ] {
            let plan = plan(before_khz, after_khz, guest_khz);
            assert_eq!(plan, TscPlan { offset_change: None, passed_ns: 2_000_000_000 });
            let cycles = 2_000_000 * u64::from(guest_khz.unwrap_or(0)) / 1_000;
            assert_eq!(plan.advance(7, guest_khz), 7 + cycles);
        }
        let mut unknown = clock(0, 0, Some(3_000_000));
        unknown.host = None;
        let plan = tsc_plan(&unknown, &clock(5, 0, Some(3_000_000)), Some(3_000_000));
        assert_eq!(plan.offset_change, None);
    }
}
