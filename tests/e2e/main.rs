//! Tier 4: real KVM machines with the workload guest, migrated through the library over loopback.
//!
//! The guest checks its own memory all the time, so a page that is lost, stale or misplaced shows as an error
//! in its report.

mod backings;
mod bad_input;
mod certificates;
mod clocks;
mod joins;
mod local;
mod migrations;
mod reconnect;
