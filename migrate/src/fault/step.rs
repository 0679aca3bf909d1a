//! The steps and their names: `sends-commit`, `record-running-synced`, `source-pauses`.

use std::fmt;
use std::str::FromStr;

use ferry_protocol::message::MessageType;
use ferry_protocol::record::Standing;

/// An enum of steps, with the list of them all.
macro_rules! steps {
    ($(#[$doc:meta])* $name:ident { $($(#[$step_doc:meta])* $step:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$step_doc])* $step),+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$step),+];
        }
    };
}

steps! {
    /// What the source does beside messages and records.
    SourceStep {
        /// It is about to connect.
        Connects,
        /// The control connection stands.
        Connected,
        /// The control connection is lost.
        Disconnected,
        /// It is about to connect its data streams.
        OpensStreams,
        /// They all stand.
        StreamsOpened,
        /// One of them is lost.
        StreamFailed,
        /// It is about to close them.
        ClosesStreams,
        /// It is about to connect new ones, after the link broke.
        ReopensStreams,
        /// The dirty log is about to be switched on.
        StartsDirtyLog,
        /// It is on.
        DirtyLogStarted,
        /// It is about to be read.
        ReadsDirtyLog,
        /// It was read.
        DirtyLogRead,
        /// It is about to be switched off.
        StopsDirtyLog,
        /// The pages of a round are about to be sent.
        RoundStarts,
        /// A chunk of a round is about to be sent.
        ChunkSends,
        /// All pages of a round are sent.
        RoundEnds,
        /// The guest is about to be stopped.
        Pauses,
        /// It stands still.
        Paused,
        /// Its state is about to be saved.
        Saves,
        /// It is saved.
        Saved,
        /// The commit is durable; the locks of its disks are about to be let go of.
        LetsGo,
        /// They are free.
        HasLetGo,
        /// A witness is about to be asked.
        AsksWitness,
        /// It has answered.
        WitnessSays,
        /// It has not.
        WitnessSilent,
        /// The operator has decided what was in doubt.
        Resolved,
        /// The operator's cancellation has come.
        Cancelled,
        /// The guest is about to go on here.
        Resumes,
        /// Its disks are this host's again; it does not run yet.
        TookBack,
        /// It runs here again.
        Resumed,
        /// It is about to be let go of for good.
        Releases,
        /// The migration is over.
        Finishes,
    }
}

steps! {
    /// What the target does beside messages and records.
    TargetStep {
        /// The machine is about to be built.
        Builds,
        /// It stands.
        Built,
        /// A frame of pages has arrived and is in memory.
        FrameArrives,
        /// A stream has reached a fence.
        FenceReached,
        /// A stream is lost.
        StreamFailed,
        /// The control connection is lost.
        Disconnected,
        /// The streams are about to be ended, because the link broke.
        EndsStreams,
        /// They have ended.
        StreamsEnded,
        /// It is about to let in new ones.
        ExpectsStreams,
        /// It is about to close the control connection.
        HangsUp,
        /// The source is back.
        Reconnected,
        /// Frames that queued for the guest are about to be forgotten.
        DropsStaleFrames,
        /// The state is about to be restored.
        Restores,
        /// It is restored.
        Restored,
        /// The record that it runs here is durable; the guest is about to be run.
        Runs,
        /// Its disks are this host's; no instruction of it has run.
        TookDisks,
        /// Its vCPUs have started.
        Started,
        /// The core is about to hear of it.
        Running,
        /// Whether a witness can be reached is about to be found out.
        ProbesWitness,
        /// It is known.
        WitnessProbed,
        /// A witness is about to be asked.
        AsksWitness,
        /// It has answered.
        WitnessSays,
        /// It has not.
        WitnessSilent,
        /// The network is about to be told.
        Announces,
        /// This host has been told to give up.
        Cancelled,
        /// The machine is about to be let go of.
        Discards,
        /// The attempt is over.
        Finishes,
    }
}

steps! {
    /// What a record says.
    RecordOf {
        /// [`Standing::Running`].
        Running,
        /// [`Standing::Committed`].
        Committed,
        /// [`Standing::Released`].
        Released,
        /// [`Standing::Receiving`].
        Receiving,
        /// [`Standing::Discarded`].
        Discarded,
        /// [`Standing::Stopped`].
        Stopped,
    }
}

impl From<&Standing> for RecordOf {
    fn from(standing: &Standing) -> Self {
        match standing {
            Standing::Running => Self::Running,
            Standing::Committed { .. } => Self::Committed,
            Standing::Released { .. } => Self::Released,
            Standing::Receiving { .. } => Self::Receiving,
            Standing::Discarded => Self::Discarded,
            Standing::Stopped => Self::Stopped,
        }
    }
}

steps! {
    /// How far the writing of a record has come.
    RecordStep {
        /// Nothing is done yet.
        Begins,
        /// The temporary file is there, empty.
        Created,
        /// It holds the record, perhaps not on the disk.
        Written,
        /// It is on the disk.
        Synced,
        /// It has replaced the old record, perhaps not on the disk.
        Renamed,
        /// That is on the disk too.
        Durable,
    }
}

/// A step of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A message is about to be handed to its connection.
    Sends(MessageType),
    /// It is written to the connection.
    Sent(MessageType),
    /// A message has arrived; the core has not heard of it.
    Receives(MessageType),
    /// A record is being written.
    Record(RecordOf, RecordStep),
    /// Of the source.
    Source(SourceStep),
    /// Of the target.
    Target(TargetStep),
}

/// More than there are types of messages.
const MESSAGE_TYPES_MAX: u16 = 256;

impl Step {
    /// Every step that there is.
    pub fn all() -> impl Iterator<Item = Self> {
        let messages = (0..MESSAGE_TYPES_MAX).filter_map(MessageType::from_number);
        let messages = messages.flat_map(|of| [Self::Sends(of), Self::Sent(of), Self::Receives(of)]);
        let records =
            RecordOf::ALL.iter().flat_map(|of| RecordStep::ALL.iter().map(|step| Self::Record(*of, *step)));
        let source = SourceStep::ALL.iter().copied().map(Self::Source);
        messages.chain(records).chain(source).chain(TargetStep::ALL.iter().copied().map(Self::Target))
    }
}

/// Its name: the words of what [`fmt::Debug`] shows, joined by hyphens.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = format!("{self:?}");
        let mut name = String::new();
        for letter in shown.chars() {
            let starts = letter.is_ascii_uppercase();
            if starts && !name.is_empty() {
                name.push('-');
            }
            if letter.is_ascii_alphanumeric() {
                name.push(letter.to_ascii_lowercase());
            }
        }
        f.pad(&name)
    }
}

/// A text names no step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no step of a migration; one is called 'sends-commit' or 'record-running-synced'")]
pub struct UnknownStep(String);

impl FromStr for Step {
    type Err = UnknownStep;

    fn from_str(name: &str) -> Result<Self, UnknownStep> {
        Self::all().find(|step| step.to_string() == name).ok_or_else(|| UnknownStep(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_step_has_a_name_of_its_own_that_reads_back() {
        let mut names = HashSet::new();
        for step in Step::all() {
            let name = step.to_string();
            assert_eq!(name.parse(), Ok(step), "{name}");
            assert!(names.insert(name.clone()), "{name} names two steps");
        }
        for name in [
            "sends-commit",
            "sent-fence-reached",
            "receives-hello",
            "record-running-synced",
            "source-pauses",
            "target-took-disks",
        ] {
            assert!(names.contains(name), "{name}");
        }
        assert!("sends".parse::<Step>().is_err());
    }
}
