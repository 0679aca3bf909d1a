//! The fault campaign: real migrations between two hosts in network namespaces, and at every step of either side a process
//! that is killed, one that stands still, or a link that is cut. What becomes of the guest is seen from outside.
//!
//! ```text
//!  plan.rs, places.rs   what happens where, from a seed
//!  trial.rs             one fault: host.rs, process.rs, hold.rs, link.rs
//!  watch.rs             the guest's heart on both sides, all the time
//!  verdict.rs           whose the guest must be, and whether it is well: leaks.rs, neighbours.rs
//!  campaign.rs          many faults; summary.rs tells of them
//! ```
//!
//! The steps are the fault points of `ferry-migrate`, which only the program that [`program`] builds has. Left out: hosts that
//! lose power. A record's durability is the file system's promise, and what is tested here is in which order it is asked for.

pub mod campaign;
mod certificates;
pub mod hold;
pub mod host;
pub mod leaks;
pub mod link;
pub mod neighbours;
pub mod places;
pub mod plan;
pub mod process;
pub mod program;
pub mod summary;
mod trial;
pub mod verdict;
pub mod watch;
