//! Asks a witness on a thread of its own, which is waited for only so long.

use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

use super::{ANSWER_PATIENCE, Witness};
use crate::engine::PANICKED;
use crate::ports::{PortError, in_words};

/// So many threads of this process may be waiting for witnesses. A hung network file system keeps them for as long as it likes.
const UNANSWERED_MAX: usize = 16;

static UNANSWERED: Semaphore = Semaphore::const_new(UNANSWERED_MAX);

/// Does `work` with the witness, or says in words why there is no answer: that it has not come within [`ANSWER_PATIENCE`], for one.
/// Nobody hears an answer that comes later.
///
/// It has a thread of its own because the runtime waits for its blocking ones when it ends, and a witness may never answer.
pub(crate) async fn asked<T: Send + 'static>(
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

/// Whether `witness` answers: does what a claim would, and decides nothing.
///
/// # Errors
/// Why not, in words; that no answer has come within [`ANSWER_PATIENCE`], for one.
pub async fn try_out(witness: &Arc<dyn Witness>) -> Result<(), String> {
    asked(witness, |witness| witness.id().and_then(|id| witness.probe(id))).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_protocol::WitnessId;
    use ferry_protocol::witness::{Claim, Ruling};
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
