//! Asks the witness on behalf of the cores: each time on a thread of its own, which is waited for only so long.

use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::source::{Failure, OnTimeout};
use ferry_protocol::witness::{Claim, Ruling};
use ferry_protocol::{Record, WitnessId};
use tokio::sync::{Semaphore, oneshot, watch};

use super::source::MigrateOptions;
use super::{PANICKED, cancelled};
use crate::ports::{Clock, PortError, RecordStore, in_words, timed};
use crate::witness::{ANSWER_PATIENCE, Witness};

/// So many threads of this process may be waiting for witnesses. A hung network file system keeps them for as long as it likes.
const UNANSWERED_MAX: usize = 16;

static UNANSWERED: Semaphore = Semaphore::const_new(UNANSWERED_MAX);

/// A witness, and which one it was when it was first asked: nothing else is to decide in its place.
#[derive(Debug, Clone)]
pub(super) struct Agreed {
    witness: Arc<dyn Witness>,
    pub(super) id: WitnessId,
}

/// Does `work` with the witness, or says in words why there is no answer: that it has not come within [`ANSWER_PATIENCE`], for one.
/// Nobody hears an answer that comes later.
///
/// It has a thread of its own because the runtime waits for its blocking ones when it ends, and a witness may never answer.
async fn asked<T: Send + 'static>(
    witness: &Arc<dyn Witness>,
    work: impl FnOnce(&dyn Witness) -> Result<T, PortError> + Send + 'static,
) -> Result<T, String> {
    let Ok(permit) = UNANSWERED.try_acquire() else {
        return Err(format!("{UNANSWERED_MAX} questions to witnesses have had no answer yet"));
    };
    let (answer, answered) = oneshot::channel();
    let witness = Arc::clone(witness);
    let started = std::thread::Builder::new().name("ferry-witness".into()).spawn(move || {
        let _permit = permit;
        let worked = work(&*witness).map_err(|error| in_words(&*error));
        let _ = answer.send(worked);
    });
    if let Err(error) = started {
        return Err(format!("no thread can be started to ask it: {error}"));
    }
    match tokio::time::timeout(ANSWER_PATIENCE, answered).await {
        Ok(Ok(worked)) => worked,
        Ok(Err(_)) => Err(PANICKED.to_owned()),
        Err(_) => Err(format!("it has not answered within {} s", ANSWER_PATIENCE.as_secs())),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Condvar, Mutex};

    /// It answers once it is let.
    #[derive(Debug, Default)]
    struct Held {
        let_go: Mutex<bool>,
        changed: Condvar,
    }

    impl Witness for Held {
        fn id(&self) -> Result<WitnessId, PortError> {
            let held = self.let_go.lock().unwrap();
            drop(self.changed.wait_while(held, |let_go| !*let_go).unwrap());
            Ok(WitnessId([1; 16]))
        }

        fn probe(&self, _: WitnessId) -> Result<(), PortError> {
            unreachable!()
        }

        fn claim(&self, _: WitnessId, _: &Claim) -> Result<Ruling, PortError> {
            panic!("a bug in a witness")
        }
    }

    impl std::fmt::Display for Held {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("held")
        }
    }

    #[tokio::test]
    async fn only_so_many_threads_hang_and_they_come_back() {
        let held = Arc::new(Held::default());
        let witness: Arc<dyn Witness> = held.clone();
        let broken = asked(&witness, |witness| {
            let claim = Claim {
                vm: ferry_protocol::VmId([1; 16]),
                epoch: ferry_protocol::Epoch::FIRST,
                migration: ferry_protocol::MigrationId([1; 16]),
                wish: ferry_protocol::witness::Wish::Run,
            };
            witness.claim(WitnessId([1; 16]), &claim)
        });
        assert_eq!(broken.await, Err(PANICKED.to_owned()));
        let questions = (0..UNANSWERED_MAX).map(|_| {
            let witness = Arc::clone(&witness);
            tokio::spawn(async move { asked(&witness, |witness| witness.id()).await })
        });
        for unanswered in questions.collect::<Vec<_>>() {
            let said = unanswered.await.unwrap().unwrap_err();
            assert!(said.contains("not answered within"), "{said}");
        }
        let said = asked(&witness, |witness| witness.id()).await.unwrap_err();
        assert!(said.contains("have had no answer yet"), "{said}");
        *held.let_go.lock().unwrap() = true;
        held.changed.notify_all();
        let all = u32::try_from(UNANSWERED_MAX).unwrap();
        drop(UNANSWERED.acquire_many(all).await.unwrap());
        assert_eq!(asked(&witness, |witness| witness.id()).await, Ok(WitnessId([1; 16])));
    }
}
