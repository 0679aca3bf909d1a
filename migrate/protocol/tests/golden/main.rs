//! Golden files: the bytes of everything that crosses a wire or stays on a disk, and every transition of both
//! cores. They lie in the workspace's `tests/golden/`.
//!
//! A golden file changes only on purpose: `FERRY_BLESS=1 cargo test -p ferry-protocol --test golden` writes what
//! the code gives now, and the difference is then read like any other.

mod files;
mod transitions;
mod wire;
