//! A minimal KVM machine monitor whose machines can be saved, restored and moved live.
//!
//! This is the only crate of ferry that talks to KVM and the only one with `unsafe` code. It knows
//! nothing of migration: it offers guest memory by page index, a dirty log, and a machine's state as
//! opaque versioned sections, and leaves what to do with them to its caller.

pub mod tap;
