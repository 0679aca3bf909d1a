//! The TSC of a vCPU and what counts by it.
//!
//! Offsets to the host's TSC are exact, and equal for vCPUs that were in step; where KVM has no offsets, or frequencies differ, the TSC is
//! set by value, and KVM brings vCPUs into step again whose values are within a second of what they should be.
//! A back end of KVM that shows guests the host's own TSC takes either without a word; so what came of it is read, and a guest
//! whose TSC would go back is refused.

// UNSAFETY: KVM's attributes of a vCPU are passed by address.
#![expect(
    unsafe_code,
    reason = "KVM reads and writes an attribute's value through the address that it is given"
)]

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::state::{get_msrs, set_msrs};
use crate::saved::StateError;
use crate::saved::sections::Vcpu as SavedVcpu;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

mod numbers {
    //! kvm-ioctls offers a vCPU's attributes on other architectures only.
    use super::*;
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// How the TSC of a restored vCPU is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TscPlan {
    /// What to add (modulo 2^64) to its offset to the host's TSC, where that is exact. Otherwise, or if
    /// KVM refuses, it is set by value.
    pub(crate) offset_change: Option<u64>,
    /// The time in ns by which a value goes on.
    pub(crate) passed_ns: u64,
}

impl TscPlan {
    /// The TSC that follows `value` at a frequency of `khz`; without one, it stands still.
    pub(crate) fn advance(self, value: u64, khz: Option<u32>) -> u64 {
        value.wrapping_add(cycles(self.passed_ns, khz))
    }
}

/// What of a vCPU's state counts time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TimedState {
    index: u8,
    tsc: Option<u64>,
    deadline: Option<u64>,
    pub(crate) offset: Option<u64>,
    pub(crate) khz: Option<u32>,
}

impl TimedState {
    pub(crate) fn of(saved: &SavedVcpu) -> Self {
        let value = |wanted| saved.msrs.iter().find(|(index, _)| *index == wanted).map(|(_, value)| *value);
        Self {
            index: saved.index,
            tsc: value(MSR_TSC),
            deadline: value(MSR_TSC_DEADLINE),
            offset: saved.tsc_offset,
            khz: saved.tsc_khz,
        }
    }
}

/// Whether an MSR is part of a [`TimedState`].
pub(super) fn is_timed(msr: u32) -> bool {
    matches!(msr, MSR_TSC | MSR_TSC_DEADLINE)
}

/// Sets the TSC, and then the deadline that counts by it.
pub(crate) fn set_time(fd: &VcpuFd, timed: &TimedState, plan: TscPlan) -> Result<(), StateError> {
    let TimedState { index, tsc, deadline, offset, khz } = *timed;
    let by_offset = match (plan.offset_change, offset) {
        (Some(change), Some(offset)) => set_tsc_offset(fd, offset.wrapping_add(change)),
        (Some(_) | None, _) => false,
    };
    if let Some(value) = tsc.filter(|_| !by_offset) {
        set_msrs(fd, index, &[(MSR_TSC, plan.advance(value, khz))])?;
    }
    if let Some(value) = deadline {
        set_msrs(fd, index, &[(MSR_TSC_DEADLINE, value)])?;
    }
    match (tsc, get_msrs(fd, &[MSR_TSC])?.first()) {
        (Some(saved), Some((_, now))) => check_came_of_it(timed, saved, *now, plan),
        (Some(_) | None, _) => Ok(()),
    }
}

/// More than this far ahead of where it should be, a TSC is worth a warning.
const AHEAD_NS_MAX: u64 = 1_000_000_000;

/// Whether a TSC that was `saved` and is `now` has gone on as planned, as far as KVM can do that.
fn check_came_of_it(timed: &TimedState, saved: u64, now: u64, plan: TscPlan) -> Result<(), StateError> {
    let khz = u64::from(timed.khz.unwrap_or(0)).max(1);
    // Differences are modulo 2^64, as in the hardware: what is more than half of that is behind.
    let ahead = now.wrapping_sub(saved);
    if ahead > u64::MAX / 2 {
        let by_ms = saved.wrapping_sub(now) / khz;
        return Err(StateError::TscBackwards { vcpu: timed.index, by_ms });
    }
    let should_be = cycles(plan.passed_ns.saturating_add(AHEAD_NS_MAX), timed.khz);
    if timed.khz.is_some() && ahead > should_be {
        let by_ms = (ahead - cycles(plan.passed_ns, timed.khz)) / khz;
        tracing::warn!(
            vcpu = timed.index,
            by_ms,
            "this host's KVM shows guests its own TSC, which is ahead of the source's"
        );
    }
    Ok(())
}

/// Takes back from the value of a saved TSC what it went on after the moment that it is saved for.
pub(crate) fn set_back(saved: &mut SavedVcpu, ahead_ns: u64) {
    let ahead = cycles(ahead_ns, saved.tsc_khz);
    for (_, value) in saved.msrs.iter_mut().filter(|(index, _)| *index == MSR_TSC) {
        *value = value.wrapping_sub(ahead);
    }
}

/// Cycles at `khz` in so many ns, modulo 2^64.
fn cycles(ns: u64, khz: Option<u32>) -> u64 {
    let cycles = u128::from(ns) * u128::from(khz.unwrap_or(0)) / 1_000_000;
    u64::try_from(cycles & u128::from(u64::MAX)).expect("reduced modulo 2^64")
}

fn tsc_offset_attribute(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(offset).expose_provenance() as u64,
        flags: 0,
    }
}

pub(crate) fn get_tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = tsc_offset_attribute(&mut offset);
    // SAFETY: KVM reads the attribute and writes one u64 to its address; both outlive the call.
    let done = unsafe { ioctl_with_ref(fd, numbers::KVM_GET_DEVICE_ATTR(), &attribute) };
    (done == 0).then(|| {
        // SAFETY: `offset` is a live local that the kernel wrote through the address above.
        unsafe { (&raw const offset).read_volatile() }
    })
}

/// Whether KVM took the offset: a back end that can't may say that it did.
fn set_tsc_offset(fd: &VcpuFd, wanted: u64) -> bool {
    let mut offset = wanted;
    let attribute = tsc_offset_attribute(&mut offset);
    // SAFETY: KVM reads the attribute and one u64 at its address; both outlive the call.
    let done = unsafe { ioctl_with_ref(fd, numbers::KVM_SET_DEVICE_ATTR(), &attribute) };
    done == 0 && get_tsc_offset(fd) == Some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tsc_that_goes_back_is_refused_by_how_much() {
        let timed = TimedState { index: 3, tsc: None, deadline: None, offset: None, khz: Some(1_000_000) };
        let plan = TscPlan { offset_change: None, passed_ns: 5_000 };
        for (saved, now) in [(7_000, 7_000), (7_000, 12_000), (u64::MAX - 10, 20), (0, 1 << 40)] {
            check_came_of_it(&timed, saved, now, plan).unwrap();
        }
        let error = check_came_of_it(&timed, 9_000_000, 1_000_000, plan).unwrap_err();
        assert!(matches!(error, StateError::TscBackwards { vcpu: 3, by_ms: 8 }), "{error}");
    }
}
