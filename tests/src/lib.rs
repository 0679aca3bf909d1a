//! What the tests and benches of ferry share.

pub mod guest;
