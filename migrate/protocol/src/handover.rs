//! Who may run: the two small machines that decide it, one a side.
//!
//! ```text
//!  source   Owner(e) --commit()--> Committing(e+1) --recorded()--> Committed(e+1) --running()--> Released(e+1)
//!             ^  ^                     |                               |
//!             |  '------ failed() -----'                               | discarded()
//!             '----------------------- reclaimed: Owner(e+2) <---------'
//!
//!               .------ taken_back() -------.
//!               v                           |
//!  target   Receiving(e) --prepared()--> Prepared(e) --commit()--> Recording(e) --recorded()--> Running(e)
//!               |                           |                          |
//!               '------- discard() ---------'  '--ask()--> Asking(e) --ruled()--'  '--failed()--> Prepared(e)
//!                            v                            |
//!                        Discarded(e) <------ruled()------'  <-- returned() -- Returning(e) <-- not_started() -- Running(e)
//!                                                                               ^  '--- keep() ---> Recording(e)
//!                                                                               '--- withheld() --- Recording(e)
//! ```
//!
//! `Asking` is only where there is a witness ([`crate::witness`]); `running()` and `discarded()` at the source are the
//! target's word, the witness's ruling, or the operator's decision.
//!
//! The rules (see docs/handover.md):
//! 1. The source may run until its commit is durable; from then on it never runs that epoch by itself.
//! 2. The target runs only on a `Commit` for the epoch it prepared, after its own record is durable.
//! 3. A target that has durably discarded an epoch never runs it; the source then takes the epoch after it.
//!
//! Nothing here does I/O: `recorded()` is called only after the record's fsync has returned.

use crate::ident::Epoch;
use crate::witness::Ruling;

/// A step that the rules forbid in this state. It is the caller's or the peer's error; the state is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step} is not allowed while {state}")]
pub struct Forbidden {
    /// What was tried.
    pub step: &'static str,
    /// In which state, in words.
    pub state: String,
}

/// The source's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceStanding {
    /// It owns the VM and may run it.
    Owner(Epoch),
    /// It is recording that it gives this epoch away. No `Commit` has been sent: it still may run.
    Committing(Epoch),
    /// It has given this epoch away and must not run.
    Committed(Epoch),
    /// The target runs this epoch; the memory can go.
    Released(Epoch),
}

impl SourceStanding {
    /// Whether the source may run the guest.
    #[must_use]
    pub const fn may_run(self) -> bool {
        match self {
            Self::Owner(_) | Self::Committing(_) => true,
            Self::Committed(_) | Self::Released(_) => false,
        }
    }

    /// Begins to give the next epoch away: the record is to be written now.
    ///
    /// # Errors
    /// Unless it is the owner.
    pub fn commit(self) -> Result<Self, Forbidden> {
        match self {
            Self::Owner(epoch) => Ok(Self::Committing(epoch.next())),
            Self::Committing(_) | Self::Committed(_) | Self::Released(_) => self.forbid("to commit"),
        }
    }

    /// The commit record is durable: `Commit` may be sent.
    ///
    /// # Errors
    /// Unless it is committing.
    pub fn recorded(self) -> Result<Self, Forbidden> {
        match self {
            Self::Committing(epoch) => Ok(Self::Committed(epoch)),
            Self::Owner(_) | Self::Committed(_) | Self::Released(_) => {
                self.forbid("to have recorded a commit")
            }
        }
    }

    /// The commit record could not be written, or the target was lost or gave up before a `Commit` could be sent. None
    /// was and none will be, so nothing was given away.
    ///
    /// # Errors
    /// Unless it is committing.
    pub fn failed(self) -> Result<Self, Forbidden> {
        match self {
            // The epoch that was almost given away is skipped, so that no stale record can speak of it.
            Self::Committing(epoch) => Ok(Self::Owner(epoch.next())),
            Self::Owner(_) | Self::Committed(_) | Self::Released(_) => self.forbid("to fail to record"),
        }
    }

    /// The target says that it runs `epoch`.
    ///
    /// # Errors
    /// Unless exactly that epoch was given away.
    pub fn running(self, epoch: Epoch) -> Result<Self, Forbidden> {
        match self {
            Self::Committed(given) if given == epoch => Ok(Self::Released(epoch)),
            Self::Owner(_) | Self::Committing(_) | Self::Committed(_) | Self::Released(_) => {
                self.forbid("to be told that the target runs it")
            }
        }
    }

    /// The target says that it has not run `epoch` and never shall: the VM is the source's again.
    ///
    /// # Errors
    /// Unless exactly that epoch was given away.
    pub fn discarded(self, epoch: Epoch) -> Result<Self, Forbidden> {
        match self {
            Self::Committed(given) if given == epoch => Ok(Self::Owner(epoch.next())),
            Self::Owner(_) | Self::Committing(_) | Self::Committed(_) | Self::Released(_) => {
                self.forbid("to be told that the target discarded it")
            }
        }
    }

    fn forbid(self, step: &'static str) -> Result<Self, Forbidden> {
        let state = match self {
            Self::Owner(epoch) => format!("it owns epoch {epoch}"),
            Self::Committing(epoch) => format!("it is recording the commit of epoch {epoch}"),
            Self::Committed(epoch) => format!("it has given away epoch {epoch}"),
            Self::Released(epoch) => format!("it has released epoch {epoch}"),
        };
        Err(Forbidden { step, state })
    }
}

/// The target's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetStanding {
    /// It receives what would run as this epoch.
    Receiving(Epoch),
    /// It could run this epoch and waits for the word.
    Prepared(Epoch),
    /// It has the word and has asked the witness for leave. Until that has ruled it may neither run nor discard.
    Asking(Epoch),
    /// It has the word and is recording that it runs. It must not run yet.
    Recording(Epoch),
    /// It owns this epoch and runs it.
    Running(Epoch),
    /// It owns this epoch but could not start it, and is giving it back. No instruction of it has run, and none may.
    Returning(Epoch),
    /// It has not run this epoch and never shall.
    Discarded(Epoch),
}

impl TargetStanding {
    /// Whether the target may run the guest.
    #[must_use]
    pub const fn may_run(self) -> bool {
        match self {
            Self::Running(_) => true,
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Returning(_)
            | Self::Discarded(_) => false,
        }
    }

    /// The epoch it speaks of.
    #[must_use]
    pub const fn epoch(self) -> Epoch {
        match self {
            Self::Receiving(epoch)
            | Self::Prepared(epoch)
            | Self::Asking(epoch)
            | Self::Recording(epoch)
            | Self::Running(epoch)
            | Self::Returning(epoch)
            | Self::Discarded(epoch) => epoch,
        }
    }

    /// Memory is complete, digests are equal, state is restored.
    ///
    /// # Errors
    /// Unless it is receiving that epoch.
    pub fn prepared(self, epoch: Epoch) -> Result<Self, Forbidden> {
        match self {
            Self::Receiving(own) if own == epoch => Ok(Self::Prepared(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Running(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to be prepared"),
        }
    }

    /// The source has not committed `epoch` and goes on sending: what is here is complete no more.
    ///
    /// # Errors
    /// Unless it is prepared for exactly that epoch.
    pub fn taken_back(self, epoch: Epoch) -> Result<Self, Forbidden> {
        match self {
            Self::Prepared(own) if own == epoch => Ok(Self::Receiving(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Running(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to go back to receiving"),
        }
    }

    /// The source gives `epoch` away, and the witness is to be asked now.
    ///
    /// # Errors
    /// Unless it is prepared for exactly that epoch.
    pub fn ask(self, epoch: Epoch) -> Result<Self, Forbidden> {
        self.commit(epoch).map(|_| Self::Asking(epoch))
    }

    /// The witness has ruled: its own epoch's record is to be written now, or it has discarded.
    ///
    /// # Errors
    /// Unless it has asked.
    pub fn ruled(self, ruling: Ruling) -> Result<Self, Forbidden> {
        match (self, ruling) {
            (Self::Asking(epoch), Ruling::Target) => Ok(Self::Recording(epoch)),
            (Self::Asking(epoch), Ruling::Source) => Ok(Self::Discarded(epoch)),
            (
                Self::Receiving(_)
                | Self::Prepared(_)
                | Self::Recording(_)
                | Self::Running(_)
                | Self::Returning(_)
                | Self::Discarded(_),
                Ruling::Target | Ruling::Source,
            ) => self.forbid("to hear from the witness"),
        }
    }

    /// The source gives `epoch` away: the record is to be written now.
    ///
    /// # Errors
    /// Unless it is prepared for exactly that epoch.
    pub fn commit(self, epoch: Epoch) -> Result<Self, Forbidden> {
        match self {
            Self::Prepared(own) if own == epoch => Ok(Self::Recording(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Running(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to take over"),
        }
    }

    /// The record that it runs is durable.
    ///
    /// # Errors
    /// Unless it is recording.
    pub fn recorded(self) -> Result<Self, Forbidden> {
        match self {
            Self::Recording(epoch) => Ok(Self::Running(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Running(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to have recorded that it runs"),
        }
    }

    /// The guest could not be started: no instruction of it has run here, and none may while it is given back.
    ///
    /// # Errors
    /// Unless it was to run.
    pub fn not_started(self) -> Result<Self, Forbidden> {
        match self {
            Self::Running(epoch) => Ok(Self::Returning(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to fail to start it"),
        }
    }

    /// That it never runs here is durable, so the answer `Discarded` may be sent.
    ///
    /// # Errors
    /// Unless it was giving it back.
    pub fn returned(self) -> Result<Self, Forbidden> {
        match self {
            Self::Returning(epoch) => Ok(Self::Discarded(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Recording(_)
            | Self::Running(_)
            | Self::Discarded(_) => self.forbid("to have given it back"),
        }
    }

    /// The source has let go, so there is nobody to give it back to: that it runs here is to be recorded once more.
    ///
    /// # Errors
    /// Unless it was giving it back.
    pub fn keep(self) -> Result<Self, Forbidden> {
        self.returned().map(|standing| Self::Recording(standing.epoch()))
    }

    /// The record could not be written, and the witness has given leave: it is given back, or written once more.
    ///
    /// # Errors
    /// Unless it is recording.
    pub fn withheld(self) -> Result<Self, Forbidden> {
        self.failed().map(|standing| Self::Returning(standing.epoch()))
    }

    /// The record could not be written, so it must not run; it may try again or discard.
    ///
    /// # Errors
    /// Unless it is recording.
    pub fn failed(self) -> Result<Self, Forbidden> {
        match self {
            Self::Recording(epoch) => Ok(Self::Prepared(epoch)),
            Self::Receiving(_)
            | Self::Prepared(_)
            | Self::Asking(_)
            | Self::Running(_)
            | Self::Returning(_)
            | Self::Discarded(_) => self.forbid("to fail to record"),
        }
    }

    /// It gives up what it received. The answer `Discarded` may be sent once this is durable.
    ///
    /// # Errors
    /// Once it has begun to record that it runs.
    pub fn discard(self) -> Result<Self, Forbidden> {
        match self {
            Self::Receiving(epoch) | Self::Prepared(epoch) | Self::Discarded(epoch) => {
                Ok(Self::Discarded(epoch))
            }
            Self::Asking(_) | Self::Recording(_) | Self::Running(_) | Self::Returning(_) => {
                self.forbid("to discard")
            }
        }
    }

    fn forbid(self, step: &'static str) -> Result<Self, Forbidden> {
        let state = match self {
            Self::Receiving(epoch) => format!("it is receiving epoch {epoch}"),
            Self::Prepared(epoch) => format!("it is prepared for epoch {epoch}"),
            Self::Asking(epoch) => format!("it has asked the witness for epoch {epoch}"),
            Self::Recording(epoch) => format!("it is recording that it runs epoch {epoch}"),
            Self::Running(epoch) => format!("it runs epoch {epoch}"),
            Self::Returning(epoch) => format!("it is giving back epoch {epoch}"),
            Self::Discarded(epoch) => format!("it has discarded epoch {epoch}"),
        };
        Err(Forbidden { step, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const E: Epoch = Epoch::new(5);

    #[test]
    fn the_source_may_run_until_its_commit_is_durable_and_not_after() {
        let owner = SourceStanding::Owner(Epoch::new(4));
        let committing = owner.commit().unwrap();
        assert!(owner.may_run() && committing.may_run());
        let committed = committing.recorded().unwrap();
        assert!(!committed.may_run());
        assert!(!committed.running(E).unwrap().may_run());
        assert_eq!(committed.discarded(E), Ok(SourceStanding::Owner(Epoch::new(6))));
        assert_eq!(committing.failed(), Ok(SourceStanding::Owner(Epoch::new(6))));
    }

    #[test]
    fn answers_for_another_epoch_are_refused() {
        let committed = SourceStanding::Committed(E);
        for other in [Epoch::new(4), Epoch::new(6)] {
            assert!(committed.running(other).is_err());
            assert!(committed.discarded(other).is_err());
            assert!(TargetStanding::Prepared(E).commit(other).is_err());
            assert!(TargetStanding::Receiving(E).prepared(other).is_err());
            assert!(TargetStanding::Prepared(E).taken_back(other).is_err());
        }
    }

    #[test]
    fn every_step_of_the_source_in_every_state() {
        use SourceStanding::{Committed, Committing, Owner, Released};
        let states = [Owner(E), Committing(E), Committed(E), Released(E)];
        type Step = fn(SourceStanding) -> Result<SourceStanding, Forbidden>;
        let steps: [Step; 5] = [
            SourceStanding::commit,
            SourceStanding::recorded,
            SourceStanding::failed,
            |s| s.running(E),
            |s| s.discarded(E),
        ];
        let allowed = states.map(|state| steps.map(|step| step(state).is_ok()));
        assert_eq!(
            allowed,
            [
                [true, false, false, false, false],
                [false, true, true, false, false],
                [false, false, false, true, true],
                [false, false, false, false, false],
            ]
        );
    }

    #[test]
    fn every_step_of_the_target_in_every_state() {
        use TargetStanding::{Asking, Discarded, Prepared, Receiving, Recording, Returning, Running};
        let states =
            [Receiving(E), Prepared(E), Asking(E), Recording(E), Running(E), Returning(E), Discarded(E)];
        type Step = fn(TargetStanding) -> Result<TargetStanding, Forbidden>;
        let steps: [Step; 12] = [
            |s| s.prepared(E),
            |s| s.taken_back(E),
            |s| s.commit(E),
            |s| s.ask(E),
            |s| s.ruled(Ruling::Target),
            TargetStanding::recorded,
            TargetStanding::failed,
            TargetStanding::discard,
            TargetStanding::not_started,
            TargetStanding::returned,
            TargetStanding::keep,
            TargetStanding::withheld,
        ];
        let allowed = states.map(|state| steps.map(|step| step(state).is_ok()));
        assert_eq!(
            allowed,
            [
                [true, false, false, false, false, false, false, true, false, false, false, false],
                [false, true, true, true, false, false, false, true, false, false, false, false],
                [false, false, false, false, true, false, false, false, false, false, false, false],
                [false, false, false, false, false, true, true, false, false, false, false, true],
                [false, false, false, false, false, false, false, false, true, false, false, false],
                [false, false, false, false, false, false, false, false, false, true, true, false],
                [false, false, false, false, false, false, false, true, false, false, false, false],
            ]
        );
        for state in states {
            assert_eq!(state.may_run(), state == Running(E));
            assert_eq!(state.ruled(Ruling::Source).is_ok(), state == Asking(E));
        }
        assert_eq!(Asking(E).ruled(Ruling::Source), Ok(Discarded(E)));
    }
}
