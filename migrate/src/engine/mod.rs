//! Drives the protocol core: hands it what happens, carries out what it asks for.
//!
//! Decisions are the core's; what stands here is plumbing: tasks, threads, channels.

pub mod source;
pub mod target;
mod vm_worker;

use std::time::Duration;

use ferry_protocol::Timestamp;

use crate::ports::Clock;

/// Sleeps until `until` by `clock`, or for ever.
async fn sleep_until(clock: &dyn Clock, until: Option<Timestamp>) {
    match until {
        Some(until) => tokio::time::sleep(until.since(clock.now())).await,
        None => std::future::pending().await,
    }
}

/// The longest that closing a connection in good order may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
