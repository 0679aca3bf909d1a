//! Asks the witness on behalf of the cores.

use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::source::{Failure, OnTimeout};
use ferry_protocol::witness::{Claim, Ruling};
use ferry_protocol::{Record, WitnessId};
use tokio::sync::watch;

use super::cancelled;
use super::source::MigrateOptions;
use crate::ports::{Clock, PortError, RecordStore, in_words, timed};
use crate::witness::Witness;
use crate::witness::patience::asked;

/// A witness, and which one it was when it was first asked: nothing else is to decide in its place.
#[derive(Debug, Clone)]
pub(super) struct Agreed {
    witness: Arc<dyn Witness>,
    pub(super) id: WitnessId,
}

/// Which witness it is.
async fn identify(witness: Option<&Arc<dyn Witness>>) -> Result<Option<Agreed>, String> {
    let Some(witness) = witness else { return Ok(None) };
    let id = asked(witness, |witness| witness.id()).await.map_err(|reason| {
        format!(
            "the witness {witness} can't be reached: {reason}; nothing is moved that it could not decide about, so see to it, or \
             start the VM and its target without --witness"
        )
    })?;
    Ok(Some(Agreed { witness: Arc::clone(witness), id }))
}

/// The witness of a source that begins to migrate, unless it is cancelled first or its time is over.
pub(super) async fn of_source(
    options: &MigrateOptions,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Option<Agreed>, Failure> {
    let patience = match options.on_timeout {
        OnTimeout::Cancel => options.timeout,
        // Then the guest is stopped to go on with it, which needs the witness first.
        OnTimeout::Stop => Duration::MAX,
    };
    tokio::select! {
        biased;
        () = cancelled(cancel) => Err(Failure::Cancelled),
        identified = identify(options.witness.as_ref()) => identified.map_err(Failure::Local),
        () = tokio::time::sleep(patience) => {
            Err(Failure::Timeout("the time was over before the witness had answered".to_owned()))
        }
    }
}

/// What a target knows before a VM comes.
pub(super) struct Known {
    /// What this host last recorded of it.
    pub(super) record: Option<Record>,
    /// Which witness this host has.
    pub(super) witness: Option<Agreed>,
}

/// What this target knows of the VM that comes with `hello`, unless its own end comes first.
pub(super) async fn known_of(
    hello: &Hello,
    records: &dyn RecordStore,
    witness: Option<&Arc<dyn Witness>>,
    cancel: &mut watch::Receiver<bool>,
) -> Result<Known, Abort> {
    let epoch = |error: PortError| Abort::new(AbortCode::Epoch, in_words(&*error));
    let record = records.load(hello.vm).map_err(epoch)?;
    // A source that comes back to ask is answered by the record alone.
    if hello.resumes {
        return Ok(Known { record, witness: None });
    }
    let witness = tokio::select! {
        biased;
        () = cancelled(cancel) => Err(Abort::new(AbortCode::Cancelled, "the target has been told to end")),
        identified = identify(witness) => identified.map_err(|text| Abort::new(AbortCode::Witness, text)),
    }?;
    Ok(Known { record, witness })
}

/// Makes `claim`; `report` hears what was ruled, or why nothing was.
pub(super) fn ask(
    agreed: Option<&Agreed>,
    claim: Claim,
    report: impl FnOnce(Result<Ruling, String>) + Send + 'static,
) {
    let Some(Agreed { witness, id }) = agreed.cloned() else { return };
    tokio::spawn(async move {
        report(asked(&witness, move |witness| witness.claim(id, &claim)).await);
    });
}

/// Measures what a claim would take.
pub(super) fn probe(
    agreed: Option<&Agreed>,
    clock: &Arc<dyn Clock>,
    report: impl FnOnce(Result<Duration, String>) + Send + 'static,
) {
    let Some(Agreed { witness, id }) = agreed.cloned() else { return };
    let clock = Arc::clone(clock);
    tokio::spawn(async move {
        let work = move |witness: &dyn Witness| {
            let (probed, took) = timed(&*clock, || witness.probe(id));
            probed.map(|()| took)
        };
        report(asked(&witness, work).await);
    });
}
