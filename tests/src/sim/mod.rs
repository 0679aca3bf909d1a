//! A seeded world in which the real protocol cores move real bytes in virtual time.
//!
//! ```text
//!  random    one u64 seed drives everything
//!  scenario  what a seed stands for: memory, guest, link, streams, troubles
//!  memory    guest RAM with a hole, byte for byte
//!  guest     a guest and a device that write, and the two logs that must see it
//!  stream    sender and receiver of one data stream: real frames, real lz4, real digests
//!  fault     bugs that are injected to see that they are caught
//!  campaign  many seeds on all cores
//!  world     the event loop, what must hold at every instant, and at the end
//!  source    what the source's host does for its core; target: the same there
//!  incoming  the target's ends of the streams
//!  control   the control connection, and how a host sorts what comes over it
//! ```
//!
//! Simulated is everything that the cores leave to their callers. It follows the engine (`ferry-migrate`) in what
//! is done in which order, but shares no code with it: the engine's own threads and sockets are for the tests on
//! real machines. Nothing here reads a clock or draws a number that does not come from the seed.

mod campaign;
mod control;
mod fault;
mod guest;
mod incoming;
mod memory;
mod random;
mod scenario;
mod source;
mod stream;
mod target;
mod world;

pub use campaign::{Played, play};
pub use fault::Bug;
pub use world::{Ending, Plan, Report, run};
