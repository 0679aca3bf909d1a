//! Source and target core against each other in virtual time: plain migrations and everything that may come
//! between.

mod admission;
mod disk;
mod failures;
mod forecast;
mod handover;
mod local;
mod plain;
mod reconnect;
mod target_side;
mod world;
