//! The peers' engines against their real programs: a guest is moved, goes on, and the report is filled in.
//!
//! Nothing here looks at how long anything took.

mod cloud_hypervisor;
mod qemu;
mod world;
