//! What ferry's cross-crate tests are built from. The tests themselves are this package's test targets.

pub mod sim;
