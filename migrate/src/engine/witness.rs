//! Asks the witness on behalf of the cores, on threads that may wait.

use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::witness::{Claim, Ruling};
use ferry_protocol::{Record, WitnessId};

use super::PANICKED;
use crate::ports::{Clock, PortError, RecordStore, in_words, timed};
use crate::witness::Witness;

/// A host's witness, if it has one.
pub(super) type MaybeWitness = Option<Arc<dyn Witness>>;

/// Which witness it is.
pub(super) async fn identify(witness: &MaybeWitness) -> Result<Option<WitnessId>, String> {
    let Some(witness) = witness.clone() else { return Ok(None) };
    let name = witness.to_string();
    let asked = tokio::task::spawn_blocking(move || witness.id().map_err(|error| in_words(&*error))).await;
    let id = asked.unwrap_or_else(|_| Err(PANICKED.to_owned()));
    id.map(Some).map_err(|reason| {
        format!(
            "the witness {name} can't be reached: {reason}; nothing is moved that it could not decide about, so see to it, or \
             start the VM and its target without --witness"
        )
    })
}

/// What a target knows before a VM comes.
pub(super) struct Known {
    /// What this host last recorded of it.
    pub(super) record: Option<Record>,
    /// Which witness this host has.
    pub(super) witness: Option<WitnessId>,
}

/// What this target knows of the VM that comes with `hello`.
pub(super) async fn known_of(
    hello: &Hello,
    records: &dyn RecordStore,
    witness: &MaybeWitness,
) -> Result<Known, Abort> {
    let epoch = |error: PortError| Abort::new(AbortCode::Epoch, in_words(&*error));
    let record = records.load(hello.vm).map_err(epoch)?;
    // A source that comes back to ask is answered by the record alone.
    if hello.resumes {
        return Ok(Known { record, witness: None });
    }
    let witness = identify(witness).await.map_err(|text| Abort::new(AbortCode::Witness, text))?;
    Ok(Known { record, witness })
}

/// Makes `claim`; `report` hears what was ruled, or why nothing was.
pub(super) fn ask(
    witness: &MaybeWitness,
    claim: Claim,
    report: impl FnOnce(Result<Ruling, String>) + Send + 'static,
) {
    let Some(witness) = witness.clone() else { return };
    tokio::task::spawn_blocking(move || {
        let ruled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| witness.claim(&claim)));
        report(match ruled {
            Ok(ruled) => ruled.map_err(|error| in_words(&*error)),
            Err(_) => Err(PANICKED.to_owned()),
        });
    });
}

/// Measures what a claim would take.
pub(super) fn probe(
    witness: &MaybeWitness,
    clock: &Arc<dyn Clock>,
    report: impl FnOnce(Result<Duration, String>) + Send + 'static,
) {
    let Some(witness) = witness.clone() else { return };
    let clock = Arc::clone(clock);
    tokio::task::spawn_blocking(move || {
        let probed =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| timed(&*clock, || witness.probe())));
        report(match probed {
            Ok((probed, took)) => probed.map(|()| took).map_err(|error| in_words(&*error)),
            Err(_) => Err(PANICKED.to_owned()),
        });
    });
}
