//! The target's side of a migration, one file a phase:
//!
//! ```text
//!  receive.rs   Greeting (known.rs: may it be taken in?) -> Building -> Receiving (pages, fences, state, Prepare)
//!  interrupted.rs  Interrupted: the link broke; back to Receiving when the source takes it up
//!  handover.rs  Prepared -> Recording -> Starting (start.rs) -> Running
//!               Discarding
//!  witness.rs   Asking, between Prepared and Recording, and GivingUp: only where there is a witness
//! ```
//!
//! The contract: **the guest runs here only after `Commit` for the prepared epoch and a durable record**, and
//! a target that has not begun to record that can discard at any time. Pages never pass through here; the
//! engine reports fences, with the digest of what each stream has written.

mod handover;
mod interrupted;
mod known;
mod receive;
mod start;
mod witness;

pub use interrupted::{KEEP_MARGIN, KEEP_MAX};

use std::collections::VecDeque;
use std::time::Duration;

use crate::admission::JoinSecret;
use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::handover::TargetStanding;
use crate::ident::{Epoch, MigrationId, StreamIndex, VmId, VmName};
use crate::layout::MemoryLayout;
use crate::liveness::{self, Liveness, Tick};
use crate::message::{Abort, AbortCode, Admit, Hello, Message, NetworkIdentity};
use crate::record::{Record, Standing};
use crate::time::Timestamp;
use crate::witness::{Claim, Ruling, Wish, WitnessId};

/// What the host brings along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This host's name, for the source's people.
    pub host: String,
    /// The source's address, for the record.
    pub source: String,
    /// Whether the connection can carry descriptors: the source is a process of this host and of its user.
    pub carries_descriptors: bool,
    /// The name that the VM must have, if the operator said one.
    pub name: Option<VmName>,
    /// What this host last recorded under the name that the target goes by, if anything.
    pub record: Option<Record>,
    /// The witness that both sides must have, if this host has one.
    pub witness: Option<WitnessId>,
}

/// How long the source may stay silent before it has described its machine.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a prepared target waits for the source to come back before it discards.
pub const PREPARED_WAIT_MAX: Duration = Duration::from_secs(30);

/// How long is waited before a record that must be written is tried again.
pub const RECORD_RETRY: Duration = Duration::from_millis(500);

/// How long is waited before a guest that could not be started is tried again, while there is nobody to give it back to.
pub const RUN_RETRY: Duration = Duration::from_secs(1);

/// How long is waited before a witness that gave no answer is asked again.
pub const WITNESS_RETRY: Duration = Duration::from_millis(500);

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A message arrived.
    Message(Message),
    /// The control connection is lost.
    Disconnected(String),
    /// The source has connected again and named this migration.
    Reconnected,
    /// The machine stands: empty, waiting for pages on its streams, or on the memory that was handed over.
    MachineBuilt,
    /// It can't be built.
    BuildFailed {
        /// [`AbortCode::NoMemory`] or [`AbortCode::CannotBuild`].
        code: AbortCode,
        /// Why, in a sentence.
        sentence: String,
    },
    /// A stream has written everything before the fence into guest memory.
    FenceReached {
        /// Which stream.
        stream: StreamIndex,
        /// Which fence.
        fence: u32,
        /// The digest of all pages that this stream has written, each as last written.
        digest: MemoryDigest,
    },
    /// A stream broke or sent what it must not.
    StreamFailed {
        /// Whether the peer broke the protocol, or only the connection.
        code: AbortCode,
        /// Why, in a sentence.
        sentence: String,
    },
    /// All threads of the data streams have ended ([`Action::EndStreams`]), so that nothing of them will be written any more.
    StreamsEnded {
        /// Pages that have arrived since the last fence that all of them had reached, each as a whole.
        arrived: PageBitmap,
        /// The digest of all pages, each as it was last taken in.
        digest: MemoryDigest,
    },
    /// The state is restored.
    StateRestored {
        /// How long that took.
        took: Duration,
    },
    /// It can't be restored.
    RestoreFailed(String),
    /// The record is durable.
    RecordWritten {
        /// How long that took.
        took: Duration,
    },
    /// It could not be written.
    RecordFailed(String),
    /// The record that stands already is written once more.
    RecordRehearsed {
        /// How long that took.
        took: Duration,
    },
    /// It could not be written once more.
    RehearsalFailed(String),
    /// The guest runs.
    VmRunning {
        /// How long starting it took.
        took: Duration,
    },
    /// The guest could not be started: no instruction of it has run, and none may from now on.
    RunFailed(String),
    /// Starting it broke off, and some of it may have run.
    RunBroke(String),
    /// The witness answers: this is how long making a claim takes.
    WitnessProbed {
        /// How long that took.
        took: Duration,
    },
    /// The witness has ruled on what [`Action::AskWitness`] claimed.
    WitnessSays(Ruling),
    /// The witness can't be reached, or can't decide; a claim may have been heard all the same.
    WitnessSilent(String),
    /// The operator wants the target to give up.
    Cancel,
    /// [`Target::poll_timeout`]'s time has come.
    Timeout,
}

/// What is to be done. Actions on the VM and the record are to be carried out in the order given.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a message; if there is no connection, drop it.
    Send(Message),
    /// Write the record durably.
    WriteRecord(Record),
    /// Write durably once more the record that stands already, to measure what that costs.
    RehearseRecord(Record),
    /// Write something to the witness that decides nothing, to measure what that costs.
    ProbeWitness,
    /// Make this claim at the witness. It must not wait for the actions on the VM, nor they for it.
    AskWitness(Claim),
    /// Build an empty machine and get ready to take its streams.
    BuildMachine {
        /// The machine in the machine monitor's own format.
        description: Vec<u8>,
        /// Its memory.
        layout: MemoryLayout,
        /// How many streams to expect.
        streams: u16,
        /// Whether they take digests of what arrives.
        verify: bool,
    },
    /// Build a machine on the memory whose descriptor came with the message before. It is the guest's, who runs on it:
    /// nothing may be written to it before [`Action::RunVm`].
    AdoptMemory {
        /// The machine in the machine monitor's own format.
        description: Vec<u8>,
        /// Its memory, end to end in the descriptor's file.
        layout: MemoryLayout,
    },
    /// Let in no data stream any more and end those that stand; [`Event::StreamsEnded`] once their threads have ended.
    EndStreams,
    /// Let in data streams whose join carries this number, and no others. The first set has number 0 and needs no word.
    ExpectStreams {
        /// The number.
        session: u32,
        /// The digest of all pages that earlier sets brought: the sum over the streams goes on from it.
        digest: MemoryDigest,
    },
    /// Close the control connection, behind what was sent on it.
    HangUp,
    /// The guest has stopped at the source: what has queued in the tap so far is stale.
    DropStaleFrames,
    /// Restore vCPUs and devices.
    RestoreState(Vec<u8>),
    /// Start the guest, or only own it if it was paused by the operator.
    RunVm {
        /// Whether its vCPUs start.
        runs: bool,
    },
    /// Tell the network where the guest is now, at once and on a schedule.
    Announce(NetworkIdentity),
    /// Close the streams and let go of machine and memory.
    DiscardMachine,
    /// Tell the caller.
    Report(Progress),
    /// It is over.
    Finish(Outcome),
}

/// What the caller may want to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A source has introduced itself.
    Greeted {
        /// The VM.
        vm: VmId,
        /// Its name.
        name: VmName,
    },
    /// Pages are arriving, for the first time or again.
    Receiving,
    /// The link broke; what has arrived is kept, and the source is awaited.
    Interrupted {
        /// What broke.
        reason: String,
    },
    /// Everything is here; the source decides.
    Prepared,
    /// The guest runs here, or is paused here as its operator had left it.
    Running,
    /// The guest is this host's, but could not be started, and nobody is there to give it back to: its machine is kept, and
    /// started again in a while where no instruction of it has run.
    CannotRun {
        /// Why.
        reason: String,
    },
    /// The attempt is over; this host is as empty as before.
    GivenUp {
        /// Why.
        reason: String,
    },
    /// The connection is lost while prepared: the source may or may not have committed.
    InDoubt,
    /// The source has committed, but the witness can't be reached for leave to run; it is asked again until it can.
    WitnessSilent {
        /// Why it can't be reached.
        reason: String,
    },
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs here.
    Running {
        /// The VM.
        vm: VmId,
        /// Its name.
        name: VmName,
        /// The epoch in which it runs.
        epoch: Epoch,
        /// The digest on which both sides agreed; zero if they agreed not to take any, or memory was handed over.
        digest: MemoryDigest,
    },
    /// It does not, and this host is as empty as before.
    Discarded {
        /// Why, in a sentence.
        reason: String,
    },
}

#[derive(Debug, Clone)]
struct Context {
    config: Config,
    actions: VecDeque<Action>,
    /// Whether the source is still there, if it pings.
    liveness: Option<Liveness>,
    /// What keys for data streams are made of, if they are to prove themselves.
    secret: Option<JoinSecret>,
}

/// Who is coming, known once `Hello` was accepted.
#[derive(Debug, Clone)]
struct Guest {
    vm: VmId,
    name: VmName,
    migration: MigrationId,
    standing: TargetStanding,
}

impl Guest {
    fn record(&self, standing: Standing) -> Record {
        // What runs here is this host's own; by which attempt it came is all that is kept of that.
        let owned = matches!(standing, Standing::Running);
        Record {
            vm: self.vm,
            name: self.name.clone(),
            epoch: self.standing.epoch(),
            standing,
            migration: (!owned).then_some(self.migration),
            arrived_by: owned.then_some(self.migration),
        }
    }
}

impl Context {
    /// Asks the witness for `wish`, in the name of `guest`.
    fn ask_witness(&mut self, guest: &Guest, wish: Wish) {
        let Guest { vm, migration, .. } = *guest;
        self.act(Action::AskWitness(Claim { vm, epoch: guest.standing.epoch(), migration, wish }));
    }

    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn send(&mut self, message: Message) {
        self.act(Action::Send(message));
    }

    fn restart_liveness(&mut self, now: Timestamp) {
        self.liveness = self.liveness.map(|_| Liveness::new(now));
    }

    /// Gives the source what its next data streams are let in with.
    fn admit(&mut self, session: u32) {
        if let Some(secret) = &self.secret {
            let key = secret.key(session);
            self.send(Message::Admit(Admit { session, key }));
        }
    }

    fn abort(&mut self, code: AbortCode, sentence: &str) {
        self.send(Message::Abort(Abort::new(code, sentence)));
    }
}

#[derive(Debug, Clone)]
enum Phase {
    Greeting(receive::Greeting),
    Building(receive::Building),
    Receiving(Box<receive::Receiving>),
    Interrupted(Box<interrupted::Interrupted>),
    Prepared(handover::Prepared),
    Asking(witness::Asking),
    Recording(handover::Recording),
    GivingUp(witness::GivingUp),
    Starting(start::Starting),
    Running(handover::Running),
    Discarding(handover::Discarding),
    Finished,
}

/// The target's state machine for one migration.
#[derive(Debug, Clone)]
pub struct Target {
    context: Context,
    phase: Phase,
}

impl Target {
    /// Begins at `now`, when a control connection stands.
    #[must_use]
    pub fn new(config: Config, now: Timestamp) -> Self {
        let phase = Phase::Greeting(receive::Greeting { deadline: now + GREETING_TIMEOUT });
        let context = Context { config, actions: VecDeque::new(), liveness: None, secret: None };
        Self { context, phase }
    }

    /// Has data streams prove themselves with keys made of `secret`, which is random. The caller checks the proofs.
    #[must_use]
    pub fn with_admission(mut self, secret: JoinSecret) -> Self {
        self.context.secret = Some(secret);
        self
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Timestamp, event: Event) {
        let Some(event) = self.listen(now, event) else { return };
        let context = &mut self.context;
        self.phase = match std::mem::replace(&mut self.phase, Phase::Finished) {
            Phase::Greeting(phase) => phase.on(now, event, context),
            Phase::Building(phase) => phase.on(now, event, context),
            Phase::Receiving(phase) => phase.on(now, event, context),
            Phase::Interrupted(phase) => phase.on(now, event, context),
            Phase::Prepared(phase) => phase.on(now, event, context),
            Phase::Asking(phase) => phase.on(now, event, context),
            Phase::Recording(phase) => phase.on(now, event, context),
            Phase::GivingUp(phase) => phase.on(now, event, context),
            Phase::Starting(phase) => phase.on(now, event, context),
            Phase::Running(phase) => phase.on(event, context),
            Phase::Discarding(phase) => phase.on(now, event, context),
            Phase::Finished => Phase::Finished,
        };
    }

    /// Takes in what shows whether the source is still there; gives back what the phase has to deal with.
    fn listen(&mut self, now: Timestamp, event: Event) -> Option<Event> {
        if matches!(event, Event::Message(_)) {
            self.context.liveness.iter_mut().for_each(Liveness::heard);
        }
        if event != Event::Timeout {
            return Some(event);
        }
        let due = self.phase_timeout().is_some_and(|due| now >= due);
        let listens = self.expects_a_sign();
        let tick = self.context.liveness.as_mut().filter(|_| listens).map(|living| living.tick(now));
        if tick == Some(Tick::Silent) {
            // So that a source that goes on later notices, too.
            self.context.act(Action::HangUp);
            let ticks = liveness::SILENT_TICKS_MAX;
            return Some(Event::Disconnected(format!("the source has said nothing for {ticks} s")));
        }
        due.then_some(Event::Timeout)
    }

    /// Whether a source that is well would ping now.
    const fn expects_a_sign(&self) -> bool {
        match self.phase {
            Phase::Receiving(_) => true,
            Phase::Greeting(_)
            | Phase::Building(_)
            | Phase::Interrupted(_)
            | Phase::Prepared(_)
            | Phase::Asking(_)
            | Phase::Recording(_)
            | Phase::GivingUp(_)
            | Phase::Starting(_)
            | Phase::Running(_)
            | Phase::Discarding(_)
            | Phase::Finished => false,
        }
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.context.actions.pop_front()
    }

    /// When [`Event::Timeout`] is to be handed in, if nothing else happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let tick = self.context.liveness.filter(|_| self.expects_a_sign()).map(|living| living.due());
        [self.phase_timeout(), tick].into_iter().flatten().min()
    }

    /// When the phase wants to be woken.
    fn phase_timeout(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Greeting(phase) => Some(phase.deadline),
            Phase::Prepared(phase) => Some(phase.discard_at),
            Phase::Building(phase) => phase.wake(),
            Phase::Asking(phase) => phase.retry_at,
            Phase::GivingUp(phase) => phase.retry_at,
            Phase::Starting(phase) => phase.wake(),
            Phase::Discarding(phase) => phase.retry_at,
            Phase::Interrupted(phase) => Some(phase.wake()),
            Phase::Receiving(_) | Phase::Recording(_) | Phase::Running(_) | Phase::Finished => None,
        }
    }

    /// Whether the target may run the guest, by the rules of the handover.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        match &self.phase {
            Phase::Starting(phase) => phase.ready.guest.standing.may_run(),
            Phase::Running(phase) => phase.guest.standing.may_run(),
            Phase::Greeting(_)
            | Phase::Building(_)
            | Phase::Receiving(_)
            | Phase::Interrupted(_)
            | Phase::Prepared(_)
            | Phase::Asking(_)
            | Phase::Recording(_)
            | Phase::GivingUp(_)
            | Phase::Discarding(_)
            | Phase::Finished => false,
        }
    }

    /// Whether `hello` comes from the source that this target is already talking to and takes up the same
    /// migration.
    #[must_use]
    pub fn resumed_by(&self, hello: &Hello) -> bool {
        hello.resumes && self.guest().is_some_and(|guest| guest.migration == hello.migration)
    }

    /// Whether `hello` proves that the source of this migration has given it up: the same VM comes again in an
    /// epoch not older than the one before that which is prepared here. Had its source committed that, it could
    /// only run a newer epoch after this target's `Discarded`.
    #[must_use]
    pub fn superseded_by(&self, hello: &Hello) -> bool {
        let fresh = |guest: &Guest| {
            guest.vm == hello.vm
                && guest.migration != hello.migration
                && guest.standing.epoch() <= hello.epoch.next()
        };
        !hello.resumes && !self.may_run() && self.guest().is_some_and(fresh)
    }

    /// Whether this migration is as good as over and only its record is being written.
    #[must_use]
    pub const fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Discarding(_) | Phase::Finished)
    }

    fn guest(&self) -> Option<&Guest> {
        match &self.phase {
            Phase::Building(phase) => Some(&phase.guest),
            Phase::Receiving(phase) => Some(&phase.guest),
            Phase::Interrupted(phase) => Some(&phase.receiving.guest),
            Phase::Prepared(phase) => Some(&phase.receiving.guest),
            Phase::Asking(phase) => Some(&phase.ready.guest),
            Phase::Recording(phase) => Some(&phase.ready.guest),
            Phase::GivingUp(phase) => Some(&phase.ready.guest),
            Phase::Starting(phase) => Some(&phase.ready.guest),
            Phase::Running(phase) => Some(&phase.guest),
            Phase::Greeting(_) | Phase::Discarding(_) | Phase::Finished => None,
        }
    }

    /// The phase in a word.
    #[must_use]
    pub const fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Greeting(_) => "greeting",
            Phase::Building(_) => "building",
            Phase::Receiving(_) => "receiving",
            Phase::Interrupted(_) => "interrupted",
            Phase::Prepared(_) => "prepared",
            Phase::Asking(_) => "asking the witness",
            Phase::Recording(_) => "recording that it runs",
            Phase::GivingUp(ref phase) => phase.word(),
            Phase::Starting(ref phase) => phase.word(),
            Phase::Running(_) => "running",
            Phase::Discarding(_) => "discarding",
            Phase::Finished => "finished",
        }
    }
}
