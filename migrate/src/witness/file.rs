//! A witness in a folder on storage that both hosts mount.
//!
//! ```text
//!  FOLDER/identity          which witness this is: 16 bytes in hex
//!  FOLDER/lock              locked (open file description lock) for as long as an entry is read and followed by another
//!  FOLDER/VM.N.entry        what was decided of a VM, numbered from 1: the highest number counts
//!  FOLDER/new-..            on its way to one of these
//! ```
//!
//! The lock only keeps claims from working in vain. A network file system withdraws it from a host that is cut off, which may act
//! all the same when it is back. So an entry is never replaced: whoever decides writes down the *next* one, by a link that fails
//! if there is one of that number already, and the one who made it has decided. The checksum in an entry finds what is torn.
//!
//! All of a claim happens in the folder whose identity was read for it (`folder.rs`). What is needed of the file system:
//! that hosts can see each other's links at once and only one can make each, and that what was fsynced lasts
//! (docs/handover.md, "What can't be promised").

use std::fmt;
use std::io;
use std::path::PathBuf;

use ferry_protocol::record::RecordError;
use ferry_protocol::witness::{Claim, Entry, Ruling, judge};
use ferry_protocol::{VmId, WitnessId};

use super::folder::{Folder, LOCK_PATIENCE, Lock, is_left_over};
use super::{Witness, random_identity};
use crate::ports::PortError;

const IDENTITY: &str = "identity";

/// As many bytes as a probe writes, about what an entry has.
const PROBE_BYTES: usize = 64;

/// Others may decide between reading and writing; each time means that somebody else got on.
const TRIES_MAX: u32 = 16;

/// So many entries of a VM are kept below the one that counts. A link by somebody who was cut off may take effect late and
/// under a number that has been removed again. That is noticed by the higher ones that are there when it is done, however many
/// of them come and go while the folder is being listed: two migrations' worth.
const KEPT: u64 = 4;

/// Why a folder can't witness at this moment.
#[derive(Debug, thiserror::Error)]
pub enum FileWitnessError {
    /// A file operation failed.
    #[error("can't {action} {path}; is the shared storage mounted here?")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{0} has been locked by somebody else for {secs} s; is a host that was lost still holding it?", secs = LOCK_PATIENCE.as_secs())]
    Locked(PathBuf),
    /// An entry is no whole entry.
    #[error("{path} can't be trusted, so nothing is decided by it; decide with 'ferry resolve'")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// A file with the name of an entry is none of that VM and number.
    #[error(
        "{0} is not what its name says, so nothing is decided here; who put it there? Decide with 'ferry resolve'"
    )]
    Misplaced(PathBuf),
    /// The identity can't be read.
    #[error(
        "{0} does not hold the identity of a witness; restore that file, or give both hosts an empty folder"
    )]
    Identity(PathBuf),
    /// The folder is not the one that was agreed on.
    #[error(
        "{folder} holds {found}, but both hosts have agreed on witness {agreed}, so nothing is decided here; was the shared storage \
         unmounted? Mount it there again, or decide with 'ferry resolve'"
    )]
    Exchanged {
        /// The folder.
        folder: PathBuf,
        /// What it should hold.
        agreed: WitnessId,
        /// What it holds, in words.
        found: String,
    },
    /// Others were always faster.
    #[error("others have decided {TRIES_MAX} times in {0} while it was being decided here")]
    Contended(PathBuf),
}

/// A witness in a folder.
#[derive(Debug)]
pub struct FileWitness {
    folder: PathBuf,
}

/// What was decided last of a VM: its entry and that one's number, 0 if there is none.
#[derive(Debug)]
struct Held {
    number: u64,
    entry: Option<Entry>,
}

impl FileWitness {
    /// The witness in `folder`, which is made when its identity is asked for; what it is in must exist.
    #[must_use]
    pub const fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Opens and locks the folder, if it is still the `agreed` one.
    fn open(&self, agreed: WitnessId) -> Result<(Folder, Lock), FileWitnessError> {
        let exchanged = |found| FileWitnessError::Exchanged { folder: self.folder.clone(), agreed, found };
        let folder = Folder::open(&self.folder)?;
        let lock = folder.lock()?.ok_or_else(|| exchanged("no witness".to_owned()))?;
        match identity_of(&folder)? {
            Some(id) if id == agreed => Ok((folder, lock)),
            Some(other) => Err(exchanged(format!("witness {other}"))),
            None => Err(exchanged("no witness".to_owned())),
        }
    }
}

fn identity_of(folder: &Folder) -> Result<Option<WitnessId>, FileWitnessError> {
    let Some(bytes) = folder.read(IDENTITY)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    // A VM's identity has the same form.
    let id = VmId::from_hex(text.trim()).map(|id| WitnessId(id.0));
    id.map(Some).ok_or_else(|| FileWitnessError::Identity(folder.path_of(IDENTITY)))
}

fn entry_name(vm: VmId, number: u64) -> String {
    format!("{vm}.{number}.entry")
}

/// The numbers of a VM's entries, ascending.
fn numbers(folder: &Folder, vm: VmId) -> Result<Vec<u64>, FileWitnessError> {
    let prefix = format!("{vm}.");
    let mut numbers = Vec::new();
    for name in folder.names()? {
        let Some(number) = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".entry")) else {
            continue;
        };
        // The same number must not stand there in two forms.
        let read = number.parse().ok().filter(|&number| number > 0 && entry_name(vm, number) == name);
        numbers.push(read.ok_or_else(|| FileWitnessError::Misplaced(folder.path_of(&name)))?);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// What was decided last of `vm`. An entry that can't be read decides nothing; nor does then an older one.
fn held(folder: &Folder, vm: VmId) -> Result<Held, FileWitnessError> {
    let Some(number) = numbers(folder, vm)?.pop() else { return Ok(Held { number: 0, entry: None }) };
    let name = entry_name(vm, number);
    // Gone since: others have decided as often as entries are kept.
    let bytes = folder.read(&name)?.ok_or_else(|| FileWitnessError::Contended(folder.path_of(&name)))?;
    let damaged = |source| FileWitnessError::Damaged { path: folder.path_of(&name), source };
    let entry = Entry::decode(&bytes).map_err(damaged)?;
    if entry.vm != vm {
        return Err(FileWitnessError::Misplaced(folder.path_of(&name)));
    }
    Ok(Held { number, entry: Some(entry) })
}

/// Has `entry` follow what is `held`, unless somebody else has been faster: says whether it is what was decided, durably.
fn decide(folder: &Folder, held: &Held, entry: &Entry) -> Result<bool, FileWitnessError> {
    let name = |number| entry_name(entry.vm, number);
    // No number of a migration comes near that; a name that somebody made up may.
    let misplaced = || FileWitnessError::Misplaced(folder.path_of(&name(held.number)));
    let number = held.number.checked_add(1).ok_or_else(misplaced)?;
    if !folder.put_new(&name(number), &entry.encode())? {
        return Ok(false);
    }
    folder.sync()?;
    let all = numbers(folder, entry.vm)?;
    if all.last().is_some_and(|&last| last > number) {
        return Ok(false);
    }
    // From the lowest on, so that what is left has no gap.
    let old = all.into_iter().filter(|&old| old < number.saturating_sub(KEPT));
    for name in old.map(name) {
        folder.remove(&name)?;
    }
    Ok(true)
}

/// Judges `claim` and decides what is to be decided.
fn rule(folder: &Folder, claim: &Claim) -> Result<Ruling, PortError> {
    for _ in 0..TRIES_MAX {
        let held = held(folder, claim.vm)?;
        let judgement = judge(claim, held.entry.as_ref())?;
        let decided = match judgement.entry {
            Some(entry) => decide(folder, &held, &entry)?,
            None => {
                // Who has decided it may have been lost before it was durable. The claimant will act on it.
                folder.sync_file(&entry_name(claim.vm, held.number))?;
                folder.sync()?;
                true
            }
        };
        // Where it was not this one that counts, what does is judged. It may be the claimant's own: the same claim gets the same
        // ruling again.
        if decided {
            return Ok(judgement.ruling);
        }
    }
    Err(FileWitnessError::Contended(folder.path_of("")).into())
}

/// Removes what others have left. Only with the lock.
fn tidy(folder: &Folder, _lock: &Lock) -> Result<(), FileWitnessError> {
    let names = folder.names()?;
    names.iter().filter(|name| is_left_over(name)).try_for_each(|name| folder.remove(name))
}

impl Witness for FileWitness {
    fn id(&self) -> Result<WitnessId, PortError> {
        let folder = Folder::make(&self.folder)?;
        let lock = folder.lock()?.ok_or_else(|| FileWitnessError::Contended(self.folder.clone()))?;
        tidy(&folder, &lock)?;
        if identity_of(&folder)?.is_none() {
            // If somebody else was faster after all, theirs is read.
            folder.put_new(IDENTITY, random_identity()?.to_string().as_bytes())?;
        }
        folder.sync_file(IDENTITY)?;
        folder.sync()?;
        let id = identity_of(&folder)?;
        Ok(id.ok_or_else(|| FileWitnessError::Identity(folder.path_of(IDENTITY)))?)
    }

    fn probe(&self, agreed: WitnessId) -> Result<(), PortError> {
        let (folder, _lock) = self.open(agreed)?;
        folder.names()?;
        folder.rehearse(&[0; PROBE_BYTES])?;
        folder.names()?;
        Ok(())
    }

    fn claim(&self, agreed: WitnessId, claim: &Claim) -> Result<Ruling, PortError> {
        let (folder, _lock) = self.open(agreed)?;
        rule(&folder, claim)
    }
}

impl fmt::Display for FileWitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file:{}", self.folder.display())
    }
}

#[cfg(test)]
mod tests;
