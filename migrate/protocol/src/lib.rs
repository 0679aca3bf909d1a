//! The sans-IO core of live migration: wire format, phases, policy and handover.
//!
//! Nothing in this crate opens a socket, reads a clock, draws a random number or knows KVM. The engine
//! hands in what happened ([`source::Event`], [`target::Event`]) together with the time, takes out what
//! is to be done ([`source::Action`], [`target::Action`]), and does it. The same code therefore runs in
//! production, in the seeded simulation and under a model checker.
//!
//! ```text
//!             source                                        target
//!  negotiate  Hello, Describe          ------------------>  builds an empty machine
//!                                      <------------------  Welcome, Admit, Ready
//!  pre-copy   pages, fence   (rounds)  ==================>  writes them into guest memory
//!                                      <------------------  FenceReached
//!  stop       pauses the guest, last pages, State  ======>
//!  prepare    Prepare(epoch+1, digest) ------------------>  compares digests, restores state
//!                                      <------------------  Prepared
//!  commit     records Committed; Commit ----------------->  records Running, runs the guest
//!                                      <------------------  Running
//!  release    records Released; Released ---------------->  announces, done
//! ```
//!
//! `-` is the control connection ([`message`]), `=` are the data streams ([`frame`]).

#![forbid(unsafe_code)]

pub mod admission;
pub mod bitmap;
pub mod digest;
pub mod encode;
pub mod frame;
pub mod handover;
pub mod ident;
pub mod layout;
pub mod liveness;
pub mod message;
pub mod negotiation;
pub mod page;
pub mod policy;
pub mod record;
pub mod source;
pub mod streams;
pub mod target;
pub mod time;
pub mod wire;
pub mod witness;
mod words;

pub use bitmap::{CHUNK_PAGES, ChunkIndex, PageBitmap, PageMask, PageRange};
pub use digest::{MemoryDigest, PageDigest};
pub use ident::{Epoch, MigrationId, StreamIndex, VmId, VmName};
pub use layout::{MemoryLayout, PAGE_BYTES, Region};
pub use message::Message;
pub use record::Record;
pub use time::Timestamp;
pub use witness::WitnessId;
