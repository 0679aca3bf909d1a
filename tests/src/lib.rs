//! What ferry's cross-crate tests and benches are built from. The tests themselves are this package's test targets.

pub mod guest;
pub mod process;
pub mod proxy;
pub mod sim;
pub mod site;
pub mod tier;
