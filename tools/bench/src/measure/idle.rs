//! Who else used the machine's processors.

use std::time::Duration;

use procfs::{CurrentSI, KernelStats};

use super::MeasureError;

/// The processors' time until a moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct MachineTime {
    busy: Duration,
    steal: Duration,
    all: Duration,
}

/// A share of all CPU time above which the machine does not count as quiet.
pub const QUIET_OTHERS_MAX: f64 = 0.10;

/// The same for what the hypervisor below took away.
pub const QUIET_STEAL_MAX: f64 = 0.05;

/// The processors' time until now, all of them together.
///
/// # Errors
/// [`MeasureError::Machine`].
pub fn now() -> Result<MachineTime, MeasureError> {
    let total =
        KernelStats::current().map_err(|source| MeasureError::Machine { source: source.into() })?.total;
    let ms = Duration::from_millis;
    let steal = ms(total.steal_ms().unwrap_or(0));
    // Guest time is part of user time.
    let busy = ms(total.user_ms() + total.nice_ms() + total.system_ms())
        + ms(total.irq_ms().unwrap_or(0) + total.softirq_ms().unwrap_or(0));
    let idle = ms(total.idle_ms() + total.iowait_ms().unwrap_or(0));
    Ok(MachineTime { busy, steal, all: busy + idle + steal })
}

/// Shares of all CPU time between two moments: what others than processes that used `own` took, and what the
/// hypervisor took away.
#[must_use]
pub fn shares(before: MachineTime, after: MachineTime, own: Duration) -> (f64, f64) {
    let all = after.all.saturating_sub(before.all).as_secs_f64();
    if all <= 0.0 {
        return (0.0, 0.0);
    }
    let others = after.busy.saturating_sub(before.busy).saturating_sub(own).as_secs_f64();
    let steal = after.steal.saturating_sub(before.steal).as_secs_f64();
    (others / all, steal / all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_work_does_not_count() {
        let second = Duration::from_secs(1);
        let before = MachineTime::default();
        let after = MachineTime { busy: 6 * second, steal: second, all: 10 * second };
        assert_eq!(shares(before, after, 4 * second), (0.2, 0.1));
        assert_eq!(shares(before, after, 7 * second), (0.0, 0.1));
        assert_eq!(shares(before, before, second), (0.0, 0.0));
        assert!(now().unwrap().all > Duration::ZERO);
    }
}
