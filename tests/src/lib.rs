//! What the tests and benches of ferry share.

pub mod guest;
pub mod process;
pub mod proxy;
pub mod tier;
