//! The command `ferry` over a real network.
