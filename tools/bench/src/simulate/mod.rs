//! What can't be run here: the production core in virtual time.
//!
//! Rounds, forecasts, the decision to stop, timeouts and every message of the handover are those of
//! [`ferry_migrate::protocol`]; only time is modelled: links by fluid flows with max-min fair shares, everything else
//! by the parameters of [`Hardware`]. Pages have no contents here.

pub mod calibrate;
pub mod cli;
mod costs;
pub mod curves;
pub mod evacuation;
pub mod guest;
pub mod hardware;
mod moving;
pub mod network;
pub mod one;
pub mod order;
pub mod output;
pub mod real;
pub mod run;
pub mod world;

pub use guest::{GuestModel, Order, WorkingSet};
pub use hardware::{Hardware, HardwareFile};
pub use order::{MigrationOrder, Route, Settings};
pub use run::{Ending, MigrationRun, Pair, migrate_one};
pub use world::World;
