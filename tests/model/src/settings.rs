//! How far the search goes, and which mistake is built in on purpose.

/// A mistake in carrying out what the cores ask for, to show that the search finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Mistake {
    /// The source takes its commit for durable before it is.
    CommitBeforeFsync,
    /// The target runs the guest as soon as it has begun to record that it does.
    RunBeforeRecord,
    /// The source resumes the guest because the target does not answer its commit.
    ResumeOnTimeout,
    /// The target says `Discarded` before that is durable.
    DiscardedBeforeFsync,
    /// The host starts a VM whose record says that it was given away.
    StartAgainstTheRecord,
    /// The target takes a witness that it can't reach for leave to run.
    RunWithoutWitness,
    /// The source takes a witness that it can't reach for leave to take the guest back.
    TakeBackWithoutWitness,
    /// The target lets data streams in that were under way when the link broke.
    LetOldStreamsIn,
    /// The source does not send again what had not arrived of a round when the link broke.
    ForgetTheRound,
    /// The source takes what was lost of a round for what the target has.
    TakeLostForKnown,
    /// The source loses what a dirty log names that was being read when the link broke.
    ForgetTheLog,
    /// The target keeps the state that it restored before the source took the migration up again.
    KeepTheFirstState,
}

/// The bounds of the search.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How many migrations are begun, one after another, in either direction.
    pub attempts: u8,
    /// How many things go wrong in all: crashes, broken connections, failing records, cancellations.
    pub faults: u8,
    /// Whether there is a witness, which any of the hosts may or may not reach.
    pub witness: bool,
    /// Whether memory goes over a data stream, and links that break before the commit are made again. Otherwise it is
    /// handed over, and a broken link ends the attempt.
    pub streams: bool,
    /// How often the guest writes its memory meanwhile, with streams.
    pub writes: u8,
    /// How many steps are taken at most.
    pub steps: Option<usize>,
    /// The mistake that is built in.
    pub mistake: Option<Mistake>,
}

impl Default for Settings {
    fn default() -> Self {
        bounds(2, 2, false)
    }
}

const fn bounds(attempts: u8, faults: u8, witness: bool) -> Settings {
    Settings { attempts, faults, witness, streams: false, writes: 0, steps: None, mistake: None }
}

const fn with_streams(faults: u8, witness: bool, writes: u8) -> Settings {
    Settings { streams: true, writes, ..bounds(1, faults, witness) }
}

/// What is searched in full in continuous integration. With streams there are more worlds for each fault: two of them are beyond
/// what can be searched there.
pub const SEARCHES: [Settings; 4] =
    [bounds(1, 2, false), bounds(1, 2, true), bounds(2, 1, false), with_streams(1, false, 1)];
