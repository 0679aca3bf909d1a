//! The version before the current one of sections that have changed, and how it becomes the current one.
//!
//! A version goes from here when its section changes again: one version back is all that is promised.

use serde::{Deserialize, Serialize};

use super::sections::{Clock, HostInstant};

/// [`Clock`] without a wall clock of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClockV2 {
    pub(super) guest_ns: u64,
    pub(super) host: Option<HostInstant>,
    pub(super) host_tsc_khz: Option<u32>,
}

impl From<ClockV2> for Clock {
    fn from(previous: ClockV2) -> Self {
        let ClockV2 { guest_ns, host, host_tsc_khz } = previous;
        let realtime_ns = host.map(|host| host.realtime_ns);
        Self { guest_ns, host, host_tsc_khz, realtime_ns }
    }
}
