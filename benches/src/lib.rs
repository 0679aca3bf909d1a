//! The benches of ferry stand beside this file: `core.rs` and `loopback.rs`. Run them with
//! `cargo bench -p ferry-benches`.
