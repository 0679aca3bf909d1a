//! Fault points: the steps of a migration at which a test may kill, stop, hold or fail the process that reaches them.
//!
//! Only the feature `fault-points` makes anything of them; without it `point` and its like compile to nothing and no program reads
//! the environment for faults. With it, a process reads what shall happen from `FERRY_FAULT`, see `armed.rs`. The steps
//! themselves are always there, so that a campaign can name them without being built with the feature.
//!
//! ```text
//!   engine/source.rs, engine/target.rs   every event before the core hears of it, every action before it is carried out
//!   transport/control.rs                 every message once it is written to its connection
//!   records.rs                           every record: created, written, synced, renamed, durable
//!   machine.rs                           around the locks of disks, and around the first instruction
//!   stream/                              every chunk that leaves, every frame that has arrived
//! ```
//!
//! A step is one of its process, which is the source or the target; nothing here knows which. Left out: what is done at a step
//! beyond the process itself, such as cutting the link. That is the campaign's (`tools/faults`), which has the process held.

#[cfg(feature = "fault-points")]
mod armed;
mod step;

#[cfg(feature = "fault-points")]
pub(crate) use armed::{
    damages, point, sent, source_action, source_event, target_action, target_event, try_point,
};
pub use step::{RecordOf, RecordStep, SourceStep, Step, TargetStep, UnknownStep};

#[cfg(not(feature = "fault-points"))]
pub(crate) use absent::{
    damages, point, sent, source_action, source_event, target_action, target_event, try_point,
};

/// What is left of the points without the feature.
#[cfg(not(feature = "fault-points"))]
mod absent {
    use std::io;

    use ferry_protocol::{source, target};

    use super::Step;

    #[inline(always)]
    pub(crate) const fn point(_: Step) {}

    #[inline(always)]
    #[expect(clippy::unnecessary_wraps, reason = "with the feature it fails")]
    pub(crate) const fn try_point(_: Step) -> io::Result<()> {
        Ok(())
    }

    #[inline(always)]
    pub(crate) const fn damages(_: Step) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) const fn sent(_: &[u8]) {}

    #[inline(always)]
    pub(crate) const fn source_event(_: &source::Event) {}

    #[inline(always)]
    pub(crate) const fn source_action(_: &source::Action) {}

    #[inline(always)]
    pub(crate) const fn target_event(_: &target::Event) {}

    #[inline(always)]
    pub(crate) const fn target_action(_: &target::Action) {}
}
