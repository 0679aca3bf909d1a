//! What this host process was refused by its own seccomp filters: for `ferry info`, and said when it happens.
//!
//! It means either that somebody has got into the process, or that a filter misses something that a library does here.

use std::collections::HashSet;
use std::time::Duration;

use ferry_vmm::confine::refusals;

use crate::api::RefusedSystemCall;

/// How often is looked for new ones.
const PERIOD: Duration = Duration::from_secs(1);

/// All that has been refused so far.
pub(crate) fn refused_system_calls() -> Vec<RefusedSystemCall> {
    let refusals = refusals().into_iter();
    refusals
        .map(|refusal| RefusedSystemCall {
            thread: refusal.role.name().to_owned(),
            system_call: refusal.system_call,
            count: refusal.count,
        })
        .collect()
}

/// Says once of each system call and kind of thread that it was refused.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    said: HashSet<(String, String)>,
}

impl Refusals {
    /// Waits until something may be new.
    pub(crate) async fn wait(&self) {
        tokio::time::sleep(PERIOD).await;
    }

    /// Says what is new.
    pub(crate) fn say(&mut self) {
        for RefusedSystemCall { thread, system_call, .. } in refused_system_calls() {
            if self.said.insert((thread.clone(), system_call.clone())) {
                tracing::warn!(
                    "a {thread} thread tried the system call {system_call}, which ferry has no use for there; it was \
                     refused. Either somebody has got into this process, or ferry's list is incomplete: please report it. \
                     'ferry info' counts them, '--seccomp log' lets them through"
                );
            }
        }
    }
}
