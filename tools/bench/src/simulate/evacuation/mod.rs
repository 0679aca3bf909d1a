//! `simulate evacuate`: a rack or a site is emptied, every VM through the same model, on links that they share.
//!
//! ```text
//!  site.rs    what is given: hosts, links, limits, plan, kinds of VMs
//!  fleet.rs   the VMs, drawn by a seed
//!  conduct.rs who goes when and where; the world underneath
//!  report.rs  what is shown
//! ```
//!
//! ```text
//!  VM ─ host's link ─ rack's uplink ─ (what all share) ─ rack's downlink ─ host's link ─ VM
//! ```

mod conduct;
mod fleet;
pub mod report;
pub mod site;

pub use conduct::{AttemptLine, Evacuation, VmEnd, VmLine, evacuate};
pub use site::Site;
