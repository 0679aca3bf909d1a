//! Every decoder that a peer reaches, as functions of bytes that must neither panic nor hold more memory than they may.
//!
//! ```text
//!  targets.rs   the functions          bytes.rs   bytes with checksums put right, numbers taken from bytes
//!  seeds.rs     what to begin with     mutate.rs  and how it is bent
//!  main.rs      the harness on a stable toolchain: `cargo xtask fuzz --seconds 60`
//!  libfuzzer/   the same functions for `cargo fuzz`, which needs a nightly toolchain and is outside of the workspace:
//!               `cargo +nightly fuzz run --fuzz-dir migrate/fuzz/libfuzzer NAME migrate/fuzz/corpus/NAME`
//!  corpus/      inputs by target that were worth keeping; all of them are tried first
//! ```
//!
//! What is not here: TLS itself (rustls fuzzes its own), and restoring devices, which needs a machine and is tested beside it.

pub mod bytes;
pub mod machines;
pub mod mutate;
pub mod seeds;
pub mod states;
pub mod targets;
