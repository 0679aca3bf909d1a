//! The operator's word on a handover that is in doubt.

use ferry_protocol::source::Resolution;
use tokio::sync::watch;

/// Hands the operator's decision to the migration that has a clone of it. A decision that comes when nothing is in doubt
/// changes nothing.
#[derive(Debug, Clone)]
pub struct Resolver(watch::Sender<Option<Resolution>>);

impl Default for Resolver {
    fn default() -> Self {
        Self(watch::channel(None).0)
    }
}

impl Resolver {
    /// Decides. The last word counts, until the migration has acted on one.
    pub fn resolve(&self, resolution: Resolution) {
        self.0.send_replace(Some(resolution));
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Resolution>> {
        self.0.subscribe()
    }

    /// The next decision.
    pub(super) async fn next(decisions: &mut watch::Receiver<Option<Resolution>>) -> Resolution {
        loop {
            if decisions.changed().await.is_err() {
                // Nobody is left who could decide.
                std::future::pending::<()>().await;
            }
            if let Some(resolution) = *decisions.borrow_and_update() {
                return resolution;
            }
        }
    }
}
