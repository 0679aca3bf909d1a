//! Runs taken together: distributions, engines against each other, and how sure one can be of either.
//!
//! [`interval`] says which intervals these are and why; [`metric`] where each figure comes from. Nothing here reads
//! a clock or draws an unseeded number: the same runs always give the same figures.

mod distribution;
pub mod interval;
pub mod limits;
pub mod metric;
mod summary;

pub use interval::Interval;
pub(crate) use summary::values_of;
pub use summary::{RatioView, paired, ratio_of, summarise};
