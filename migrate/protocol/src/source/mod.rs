//! The source's side of a migration, one file a phase:
//!
//! ```text
//!  negotiate.rs  Greeting -> Describing -> OpeningStreams
//!  local.rs      Offering: memory handed over within one host, instead of the streams and pre-copy
//!  precopy.rs    PreCopy: rounds until the forecast downtime fits
//!  stop.rs       Stopping: pause, last log, last pages, state
//!                Preparing: the target checks and restores
//!  reconnect.rs  Reconnecting: the link broke; back to PreCopy with what the target lacks
//!  commit.rs     Recording -> Committed -> Releasing, or Reclaiming; LettingGo if the operator says so
//!  undo.rs       Undoing: whatever failed before the commit, the guest goes on here
//! ```
//!
//! The contract: **until the commit is durable, every failure ends with the guest running at the source**;
//! afterwards only the target's word decides. [`Source::handle`] takes events, [`Source::poll_action`] gives
//! work. Actions on the VM ([`Action::on_vm`]) must be carried out one after another in the order given.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

mod commit;
mod interface;
mod local;
mod negotiate;
mod precopy;
mod reconnect;
mod stop;
mod undo;

pub use interface::{
    Action, Config, Downtime, Event, Failure, MemoryPath, NEGOTIATION_TIMEOUT, OnTimeout, Outcome, Progress,
    Reconnection, Resolution, RoundReport, RoundSent, STANDSTILL_FORCED_MAX, Summary, standstill_max,
};
pub use reconnect::RECONNECTIONS_MAX;

use std::collections::VecDeque;

use crate::admission::JoinKey;
use crate::handover::SourceStanding;
use crate::ident::Epoch;
use crate::layout::MemoryLayout;
use crate::liveness::{self, Liveness, Tick};
use crate::message::{Admit, Message};
use crate::negotiation::Features;
use crate::page::Compression;
use crate::policy::{FixedCosts, LinkEstimate};
use crate::record::{Record, Standing};
use crate::time::Timestamp;

/// What every phase needs.
#[derive(Debug, Clone)]
struct Context {
    config: Config,
    layout: MemoryLayout,
    actions: VecDeque<Action>,
    started: Timestamp,
    standing: SourceStanding,
    host: String,
    rounds: Vec<RoundReport>,
    link: LinkEstimate,
    costs: FixedCosts,
    /// What both sides can do.
    features: Features,
    fence: u32,
    /// The last fence that is known to have been reached.
    reached: u32,
    /// Which set of data streams is in use, or was last announced.
    session: u32,
    reconnections: Vec<Reconnection>,
    /// Whether the target is still there, if it answers pings.
    liveness: Option<Liveness>,
    /// Whether the dirty log may be on.
    logging: bool,
    /// What lets the next data streams in at the target, if it has said.
    admitted: Option<Admit>,
}

impl Context {
    fn act(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn send(&mut self, message: Message) {
        self.act(Action::Send(message));
    }

    fn report(&mut self, progress: Progress) {
        self.act(Action::Report(progress));
    }

    fn record(&self, epoch: Epoch, standing: Standing) -> Record {
        let given = matches!(standing, Standing::Committed { .. } | Standing::Released { .. });
        Record {
            vm: self.config.vm,
            name: self.config.name.clone(),
            epoch,
            standing,
            migration: given.then_some(self.config.migration),
            arrived_by: self.config.arrived_by,
        }
    }

    /// Whether both sides take digests of memory and compare them.
    const fn verifies(&self) -> bool {
        !self.features.contains(Features::UNVERIFIED)
    }

    /// Whether all of memory is read once more while the guest stands still.
    fn verifies_whole(&self) -> bool {
        self.config.verify_whole && self.verifies() && self.config.memory == MemoryPath::Streams
    }

    fn next_fence(&mut self) -> u32 {
        self.fence += 1;
        self.fence
    }

    fn deadline(&self) -> Timestamp {
        self.started + self.config.timeout
    }
}

/// The phases, in order; each owns its data.
#[derive(Debug, Clone)]
enum Phase {
    Connecting(negotiate::Connecting),
    Greeting(negotiate::Greeting),
    Describing(negotiate::Describing),
    OpeningStreams(negotiate::OpeningStreams),
    Offering(local::Offering),
    PreCopy(precopy::PreCopy),
    Reconnecting(Box<reconnect::Reconnecting>),
    Stopping(stop::Stopping),
    Preparing(stop::Preparing),
    Recording(commit::Recording),
    Committed(commit::Committed),
    Releasing(commit::Releasing),
    Reclaiming(commit::Reclaiming),
    LettingGo(commit::LettingGo),
    Undoing(undo::Undoing),
    Finished,
}

/// The source's state machine.
#[derive(Debug, Clone)]
pub struct Source {
    context: Context,
    phase: Phase,
}

impl Source {
    /// Begins a migration of a guest with `layout` at `now`: the first action is to connect.
    #[must_use]
    pub fn new(config: Config, layout: MemoryLayout, now: Timestamp) -> Self {
        let mut costs = FixedCosts::default();
        if config.verify_whole {
            costs.expect_whole(layout.page_count());
        }
        let mut context = Context {
            standing: SourceStanding::Owner(config.epoch),
            config,
            layout,
            actions: VecDeque::new(),
            started: now,
            host: String::new(),
            rounds: Vec::new(),
            link: LinkEstimate::default(),
            costs,
            features: Features::NONE,
            fence: 0,
            reached: 0,
            session: 0,
            reconnections: Vec::new(),
            liveness: None,
            logging: false,
            admitted: None,
        };
        let phase = negotiate::begin(&mut context, now);
        Self { context, phase }
    }

    /// Takes in what happened at `now`. Events that no longer matter (the end of work that an abort has
    /// overtaken) are dropped; whatever a peer does wrong ends the attempt, never the guest.
    pub fn handle(&mut self, now: Timestamp, event: Event) {
        let Some(event) = self.listen(now, event) else { return };
        let context = &mut self.context;
        self.phase = match std::mem::replace(&mut self.phase, Phase::Finished) {
            Phase::Connecting(phase) => phase.on(now, event, context),
            Phase::Greeting(phase) => phase.on(now, event, context),
            Phase::Describing(phase) => phase.on(now, event, context),
            Phase::OpeningStreams(phase) => phase.on(now, event, context),
            Phase::Offering(phase) => phase.on(now, event, context),
            Phase::PreCopy(phase) => phase.on(now, event, context),
            Phase::Reconnecting(phase) => phase.on(now, event, context),
            Phase::Stopping(phase) => phase.on(now, event, context),
            Phase::Preparing(phase) => phase.on(now, event, context),
            Phase::Recording(phase) => phase.on(now, event, context),
            Phase::Committed(phase) => phase.on(now, event, context),
            Phase::Releasing(phase) => phase.on(event, context),
            Phase::Reclaiming(phase) => phase.on(event, context),
            Phase::LettingGo(phase) => phase.on(event, context),
            Phase::Undoing(phase) => phase.on(event, context),
            Phase::Finished => Phase::Finished,
        };
    }

    /// Takes in what shows whether the target is still there; gives back what the phase has to deal with.
    fn listen(&mut self, now: Timestamp, event: Event) -> Option<Event> {
        match event {
            Event::Message(Message::Admit(admit)) => {
                self.context.liveness.iter_mut().for_each(Liveness::heard);
                self.context.admitted = Some(admit);
                None
            }
            Event::Message(message) => {
                self.context.liveness.iter_mut().for_each(Liveness::heard);
                (message != Message::Pong(liveness::TOKEN)).then_some(Event::Message(message))
            }
            Event::Timeout => {
                let due = self.phase_timeout().is_some_and(|due| now >= due);
                let listens = self.expects_a_sign();
                let tick = self.context.liveness.as_mut().filter(|_| listens).map(|living| living.tick(now));
                match tick {
                    Some(Tick::Silent) => {
                        let ticks = liveness::SILENT_TICKS_MAX;
                        return Some(Event::Disconnected(format!(
                            "the target has said nothing for {ticks} s"
                        )));
                    }
                    Some(Tick::Ask) => self.context.send(Message::Ping(liveness::TOKEN)),
                    Some(Tick::NotYet) | None => {}
                }
                due.then_some(Event::Timeout)
            }
            other => Some(other),
        }
    }

    /// Whether a target that is well would answer now.
    const fn expects_a_sign(&self) -> bool {
        match self.phase {
            Phase::Describing(_)
            | Phase::OpeningStreams(_)
            | Phase::Offering(_)
            | Phase::PreCopy(_)
            | Phase::Stopping(_)
            | Phase::Preparing(_) => true,
            Phase::Connecting(_)
            | Phase::Greeting(_)
            | Phase::Reconnecting(_)
            | Phase::Recording(_)
            | Phase::Committed(_)
            | Phase::Releasing(_)
            | Phase::Reclaiming(_)
            | Phase::LettingGo(_)
            | Phase::Undoing(_)
            | Phase::Finished => false,
        }
    }

    /// Whether it is not known here who runs the guest, so that the operator may decide it.
    #[must_use]
    pub const fn is_in_doubt(&self) -> bool {
        matches!(&self.phase, Phase::Committed(phase) if phase.is_doubted())
    }

    /// What the target lets the data streams of `session` in with; `None` if it has not said.
    #[must_use]
    pub fn join_key(&self, session: u32) -> Option<JoinKey> {
        self.context.admitted.as_ref().filter(|admit| admit.session == session).map(|admit| admit.key.clone())
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
            Phase::Connecting(phase) => Some(phase.deadline),
            Phase::Greeting(phase) => Some(phase.deadline),
            Phase::Describing(phase) => Some(phase.deadline),
            Phase::OpeningStreams(phase) => Some(phase.deadline),
            Phase::Offering(phase) => Some(phase.wake()),
            Phase::PreCopy(phase) => phase.wake(&self.context),
            Phase::Reconnecting(phase) => Some(phase.wake(&self.context)),
            Phase::Stopping(phase) => Some(phase.deadline()),
            Phase::Preparing(phase) => Some(phase.deadline()),
            Phase::Committed(phase) => phase.deadline(),
            Phase::Recording(_)
            | Phase::Releasing(_)
            | Phase::Reclaiming(_)
            | Phase::LettingGo(_)
            | Phase::Undoing(_)
            | Phase::Finished => None,
        }
    }

    /// Whether the source may run the guest, by the rules of the handover.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        self.context.standing.may_run()
    }

    /// The phase in a word.
    #[must_use]
    pub const fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Connecting(_) => "connecting",
            Phase::Greeting(_) => "greeting",
            Phase::Describing(_) => "describing",
            Phase::OpeningStreams(_) => "opening streams",
            Phase::Offering(_) => "offering memory",
            Phase::PreCopy(_) => "pre-copy",
            Phase::Reconnecting(_) => "reconnecting",
            Phase::Stopping(_) => "stop-and-copy",
            Phase::Preparing(_) => "preparing",
            Phase::Recording(_) => "recording the commit",
            Phase::Committed(_) => "committed",
            Phase::Releasing(_) => "releasing",
            Phase::Reclaiming(_) => "reclaiming",
            Phase::LettingGo(_) => "letting go",
            Phase::Undoing(_) => "undoing",
            Phase::Finished => "finished",
        }
    }
}

/// What all phases before the commit do alike with events that end the attempt.
fn interruption(event: &Event) -> Option<Failure> {
    match event {
        Event::Cancel => Some(Failure::Cancelled),
        Event::Disconnected(reason) | Event::StreamFailed(reason) => Some(Failure::Link(reason.clone())),
        Event::VmFailed(reason)
        | Event::ResumeFailed(reason)
        | Event::RecordFailed(reason)
        | Event::RehearsalFailed(reason) => Some(Failure::Local(reason.clone())),
        Event::Message(Message::Abort(abort)) => Some(Failure::Refused(abort.clone())),
        Event::Connected
        | Event::Message(_)
        | Event::StreamsOpened
        | Event::DirtyLogStarted
        | Event::DirtyLogRead { .. }
        | Event::RoundSent(_)
        | Event::Paused
        | Event::StateSaved { .. }
        | Event::RecordWritten { .. }
        | Event::RecordRehearsed { .. }
        | Event::VmResumed
        | Event::WitnessSays(_)
        | Event::WitnessSilent(_)
        | Event::Resolve(_)
        | Event::Timeout => None,
    }
}

/// What an event that a phase has no use for means before the commit: a peer's message out of turn ends the
/// attempt, anything else is the late end of something and is dropped (`Ok`).
fn out_of_turn(event: &Event, phase: &'static str) -> Result<(), Failure> {
    match event {
        Event::Message(message) => Err(Failure::Protocol(format!(
            "a {:?} message has no place while {phase}",
            message.message_type()
        ))),
        _ => Ok(()),
    }
}

/// What this source offers.
fn features_offered(config: &Config) -> Features {
    let mut ours = Features::ours_on(config.memory == MemoryPath::HandedOver);
    if config.verify {
        ours = ours.without(Features::UNVERIFIED);
    }
    if config.reconnect.is_zero() || config.memory == MemoryPath::HandedOver {
        ours = ours.without(Features::RESUMPTION);
    }
    if config.witness.is_some() {
        ours = ours.and(Features::WITNESS);
    }
    ours
}

/// What the two sides must both be able to do, as this source wants it.
fn features_wanted(config: &Config) -> Features {
    match (config.memory, config.compression) {
        // No page is packed, or even sent.
        (
            MemoryPath::HandedOver,
            Compression::None | Compression::Lz4 | Compression::Zstd(_) | Compression::Auto,
        ) => Features::HAND_OVER,
        (MemoryPath::Streams, Compression::None) => Features::NONE,
        (MemoryPath::Streams, Compression::Lz4) => Features::DELTA.and(Features::LZ4),
        (MemoryPath::Streams, Compression::Zstd(_)) => Features::DELTA.and(Features::ZSTD),
        (MemoryPath::Streams, Compression::Auto) => Features::DELTA.and(Features::LZ4).and(Features::ZSTD),
    }
}
