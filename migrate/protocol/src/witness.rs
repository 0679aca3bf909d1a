//! A witness: a third place that both sides reach more reliably than each other, and that decides once who has the VM.
//!
//! For each VM it holds one entry, which is changed by compare-and-swap only. [`judge`] says what a claim makes of the entry
//! and what it tells the claimant; a witness's implementation does nothing but read, judge, and write if nobody was faster.
//!
//! ```text
//!              target: Run                        source: TakeBack
//!  undecided ---------------> Runs(e+1) -----------------------------> Released(e+1)
//!      |                         |  target: GiveUp
//!      |  source: TakeBack       v
//!      '------------------> Discarded(e+1)
//! ```
//!
//! - A target runs epoch e+1 only once `Run` was ruled its own, so a source that finds the epoch undecided may take it back.
//! - A source that finds that the target has it lets go, and the entry says so: from then on the target can't give up any
//!   more. A target that could not start the guest gives up at the witness first, so that never both let go.
//! - Claims are idempotent: an answer that was lost is given again.
//!
//! An entry is never deleted, and no lease may take it away: a decision that expired could be taken twice. A later epoch of
//! the VM replaces it.

use serde::{Deserialize, Serialize};

use crate::ident::{Epoch, MigrationId, VmId};
use crate::record::{RecordError, Sealed};

/// What every entry begins with.
pub const ENTRY_MAGIC: [u8; 4] = *b"FRWE";

/// The entry format that this crate writes.
pub const ENTRY_VERSION: u16 = 1;

/// Which witness: 16 random bytes that are kept in it, so that two hosts can tell whether they have the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WitnessId(pub [u8; 16]);

impl std::fmt::Display for WitnessId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a side asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wish {
    /// The target has the source's `Commit` and wants to run the guest.
    Run,
    /// The target could not start it and wants to give it back.
    GiveUp,
    /// The source has not heard from the target and wants it back.
    TakeBack,
}

/// A side's claim to one epoch of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The VM.
    pub vm: VmId,
    /// The epoch that was to be given away.
    pub epoch: Epoch,
    /// By which attempt.
    pub migration: MigrationId,
    /// What is wanted.
    pub wish: Wish,
}

/// Who has the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ruling {
    /// The target has the claimed epoch, or had it: the source lets go.
    Target,
    /// The claimed epoch has not run and never will: the source has the VM.
    Source,
}

/// What was decided of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// The target may run it.
    Runs,
    /// The same, and the source knows and has let go.
    Released,
    /// It never runs.
    Discarded,
}

/// What a witness holds of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// The VM.
    pub vm: VmId,
    /// The epoch that was decided.
    pub epoch: Epoch,
    /// The attempt that would give it away.
    pub migration: MigrationId,
    /// What was decided.
    pub verdict: Verdict,
}

/// What becomes of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// What the claimant is told, once `entry` is durable.
    pub ruling: Ruling,
    /// What the witness is to hold from now on, if it changes.
    pub entry: Option<Entry>,
}

/// The witness's entry is of another attempt at the same epoch, which can't be: an epoch is given away only once. Somebody
/// has used a copy of a host's records, so nothing can be decided here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the witness has decided epoch {epoch} of VM {vm} for migration {held}, not for {claimed}: were a host's records copied? \
     Find out which host runs the VM, and decide it with 'ferry resolve'"
)]
pub struct Conflict {
    /// The VM.
    pub vm: VmId,
    /// The epoch.
    pub epoch: Epoch,
    /// The attempt in the entry.
    pub held: MigrationId,
    /// The attempt of the claim.
    pub claimed: MigrationId,
}

/// What `claim` makes of `entry`, the VM's own or none.
///
/// # Errors
/// [`Conflict`]: nothing is decided.
pub fn judge(claim: &Claim, entry: Option<&Entry>) -> Result<Judgement, Conflict> {
    let Claim { vm, epoch, migration, wish } = *claim;
    let decide =
        |verdict, ruling| Ok(Judgement { ruling, entry: Some(Entry { vm, epoch, migration, verdict }) });
    let stands = |ruling| Ok(Judgement { ruling, entry: None });
    let held = match entry.filter(|entry| entry.epoch >= epoch) {
        None => None,
        // Only who ran the claimed epoch can have given a later one away, or the source itself took it back: then it
        // would not ask any more.
        Some(later) if later.epoch > epoch => {
            return stands(match wish {
                Wish::TakeBack => Ruling::Target,
                Wish::Run | Wish::GiveUp => Ruling::Source,
            });
        }
        Some(same) if same.migration == migration => Some(same.verdict),
        Some(other) => {
            return Err(Conflict { vm, epoch, held: other.migration, claimed: migration });
        }
    };
    match (wish, held) {
        (Wish::Run, None) => decide(Verdict::Runs, Ruling::Target),
        (Wish::TakeBack | Wish::GiveUp, None) | (Wish::GiveUp, Some(Verdict::Runs)) => {
            decide(Verdict::Discarded, Ruling::Source)
        }
        (Wish::TakeBack, Some(Verdict::Runs)) => decide(Verdict::Released, Ruling::Target),
        (Wish::Run, Some(Verdict::Runs))
        | (Wish::Run | Wish::GiveUp | Wish::TakeBack, Some(Verdict::Released)) => stands(Ruling::Target),
        (Wish::Run | Wish::GiveUp | Wish::TakeBack, Some(Verdict::Discarded)) => stands(Ruling::Source),
    }
}

impl Entry {
    const SEALED: Sealed = Sealed { magic: ENTRY_MAGIC, version: ENTRY_VERSION };

    /// The entry as a witness keeps it: framed and checked as a record is ([`crate::record`]).
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        Self::SEALED.seal(self)
    }

    /// Reads an entry; the bytes must be exactly one.
    ///
    /// # Errors
    /// [`RecordError`]: nothing can be decided by it.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        Self::SEALED.open(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISHES: [Wish; 3] = [Wish::Run, Wish::GiveUp, Wish::TakeBack];

    fn claim(wish: Wish, epoch: u64) -> Claim {
        Claim { vm: VmId([1; 16]), epoch: Epoch::new(epoch), migration: MigrationId([2; 16]), wish }
    }

    fn entry(verdict: Verdict) -> Entry {
        Entry { vm: VmId([1; 16]), epoch: Epoch::new(5), migration: MigrationId([2; 16]), verdict }
    }

    #[test]
    fn every_wish_at_every_entry() {
        let held = [None, Some(Verdict::Runs), Some(Verdict::Released), Some(Verdict::Discarded)];
        let judged = held.map(|held| {
            WISHES.map(|wish| {
                let before = held.map(entry);
                let judgement = judge(&claim(wish, 5), before.as_ref()).unwrap();
                (judgement.ruling, judgement.entry.map(|entry| entry.verdict).or(held).unwrap())
            })
        });
        let (target, source) = (Ruling::Target, Ruling::Source);
        let (runs, released, discarded) = (Verdict::Runs, Verdict::Released, Verdict::Discarded);
        assert_eq!(
            judged,
            [
                [(target, runs), (source, discarded), (source, discarded)],
                [(target, runs), (source, discarded), (target, released)],
                [(target, released); 3],
                [(source, discarded); 3],
            ]
        );
    }

    #[test]
    fn a_claim_that_is_repeated_is_answered_the_same() {
        for wish in WISHES {
            let first = judge(&claim(wish, 5), None).unwrap();
            let again = judge(&claim(wish, 5), first.entry.as_ref()).unwrap();
            assert_eq!(again, Judgement { ruling: first.ruling, entry: None });
        }
    }

    #[test]
    fn an_older_entry_is_replaced_and_a_newer_one_stands() {
        let old = entry(Verdict::Released);
        assert_eq!(judge(&claim(Wish::TakeBack, 6), Some(&old)).unwrap().ruling, Ruling::Source);
        let rulings = WISHES.map(|wish| judge(&claim(wish, 4), Some(&old)).unwrap());
        assert!(rulings.iter().all(|judgement| judgement.entry.is_none()));
        assert_eq!(
            rulings.map(|judgement| judgement.ruling),
            [Ruling::Source, Ruling::Source, Ruling::Target]
        );
    }

    #[test]
    fn another_attempt_at_the_same_epoch_decides_nothing() {
        let other = Entry { migration: MigrationId([9; 16]), ..entry(Verdict::Discarded) };
        for wish in WISHES {
            let error = judge(&claim(wish, 5), Some(&other)).unwrap_err();
            assert!(error.to_string().contains("ferry resolve"), "{error}");
        }
    }

    #[test]
    fn an_entry_reads_back_and_no_part_of_it_does() {
        let bytes = entry(Verdict::Runs).encode();
        assert_eq!(Entry::decode(&bytes), Ok(entry(Verdict::Runs)));
        for length in 0..bytes.len() {
            assert!(Entry::decode(&bytes[..length]).is_err(), "torn at {length}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(Entry::decode(&bad).is_err(), "byte {at}");
        }
    }
}
