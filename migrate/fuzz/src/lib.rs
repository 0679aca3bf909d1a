//! Every decoder that a peer reaches, as functions of bytes that must neither panic nor hold more memory than they may.
//!
//! ```text
//!  targets.rs   the functions            bytes.rs   bytes with checksums put right, numbers taken from bytes
//!  machines.rs  decoding a machine's     states.rs  states by their sections
//!               state, and restoring it
//!  target_side.rs, source_side.rs  the two state machines and their hosts, by scripts (script.rs)
//!  seeds.rs     what to begin with       mutate.rs  and how it is bent
//!  conversations.rs  scripts among it
//!  main.rs      the harness without coverage to go by: `cargo xtask fuzz --seconds 60`
//!  libfuzzer/   the same functions under libFuzzer, outside of the workspace
//!  corpus/      inputs by target that were worth keeping; all of them are tried first
//! ```
//!
//! libFuzzer needs a C++ compiler and no other toolchain. What it finds goes into the first folder that it is given:
//!
//! ```text
//! mkdir -p target/found && cd migrate/fuzz/libfuzzer
//! cargo run --release --bin control -- -max_total_time=60 -max_len=65536 ../../../target/found
//! ```
//!
//! With more folders behind it, such as `../corpus/frame` for `frame`, it begins with what is in them. `cargo +nightly fuzz run
//! --fuzz-dir migrate/fuzz/libfuzzer control` does the same with the address sanitizer.
//!
//! What is not here: TLS itself (rustls fuzzes its own), and the control API, which only who owns the VM reaches.

pub mod bytes;
pub mod conversations;
pub mod machines;
pub mod mutate;
pub mod script;
pub mod seeds;
pub mod source_side;
pub mod states;
pub mod target_side;
pub mod targets;
