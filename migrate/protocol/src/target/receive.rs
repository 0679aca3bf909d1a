//! Greeting, building the empty machine, and receiving until everything is here and the same.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use crate::bitmap::PageBitmap;
use crate::digest::MemoryDigest;
use crate::handover::TargetStanding;
use crate::ident::StreamIndex;
use crate::layout::{MemoryLayout, Region};
use crate::liveness::Liveness;
use crate::message::{
    AbortCode, Describe, FenceReached, HandOver, Hello, KeepFor, Message, NetworkIdentity, Prepare, Prepared,
    Ready, Rehearse, Resume, Running, State, Welcome,
};
use crate::negotiation::{Features, common_version};
use crate::record::{Record, Standing};
use crate::time::Timestamp;

use super::handover::{self, discard, refuse};
use super::interrupted::{self, KEEP_MARGIN, KEEP_MAX, loss};
use super::known;
use super::witness::{Rehearsing, features, has_witness_as, is_same, no_witness};
use super::{Action, Context, Event, Guest, Phase, Progress};

/// Nobody has introduced themselves yet, or has but not said what to build.
#[derive(Debug, Clone)]
pub(super) struct Greeting {
    pub(super) deadline: Timestamp,
}

impl Greeting {
    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match event {
            Event::Message(Message::Hello(hello)) => greet(&hello, now, context),
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Greeting(self)
            }
            Event::Message(Message::Abort(abort)) => refuse(None, &abort.sentence, context),
            Event::Message(other) => {
                let text = format!("a {:?} message came before any Hello", other.message_type());
                refuse(Some(AbortCode::Protocol), &text, context)
            }
            Event::Disconnected(reason) => refuse(None, &reason, context),
            Event::Cancel => refuse(Some(AbortCode::Cancelled), "the target was told to give up", context),
            Event::Timeout => refuse(Some(AbortCode::Timeout), "no Hello came in time", context),
            _ => Phase::Greeting(self),
        }
    }
}

fn greet(hello: &Hello, now: Timestamp, context: &mut Context) -> Phase {
    let Some(version) = common_version(hello.version_oldest, hello.version_newest) else {
        let text = format!(
            "the source speaks versions {} to {} of the protocol, this target {} to {}",
            hello.version_oldest,
            hello.version_newest,
            crate::wire::VERSION_OLDEST,
            crate::wire::VERSION_NEWEST
        );
        return refuse(Some(AbortCode::Version), &text, context);
    };
    if hello.resumes {
        return answer_from_record(hello, context);
    }
    if let Some(wanted) = context.config.name.as_ref().filter(|&name| *name != hello.name) {
        let text = format!("this target waits for VM '{wanted}', not for '{}'", hello.name);
        return refuse(Some(AbortCode::CannotBuild), &text, context);
    }
    if let Err(refusal) = known::check(context.config.record.as_ref(), hello) {
        return refuse(Some(refusal.code()), &refusal.to_string(), context);
    }
    if let Err(text) = has_witness_as(hello, context) {
        return refuse(Some(AbortCode::Witness), &text, context);
    }
    context.act(Action::Report(Progress::Greeted { vm: hello.vm, name: hello.name.clone() }));
    context.send(Message::Welcome(Welcome {
        version,
        features: features(context).both(hello.features),
        host: context.config.host.clone(),
    }));
    if Features::OURS.both(hello.features).contains(Features::KEEPALIVE) {
        context.liveness = Some(Liveness::new(now));
    }
    let verify = !hello.features.contains(Features::UNVERIFIED);
    let standing = TargetStanding::Receiving(hello.epoch.next());
    let guest = Guest { vm: hello.vm, name: hello.name.clone(), migration: hello.migration, standing };
    let deadline = now + super::GREETING_TIMEOUT;
    let proves = hello.features.contains(Features::ADMISSION);
    let witnessed = context.config.witness.is_none();
    Phase::Building(Building {
        guest,
        step: BuildStep::AwaitingDescription,
        deadline,
        verify,
        proves,
        witnessed,
    })
}

/// A source that may have committed comes back, but this process has nothing of its migration any more: it was
/// discarded, or this host was restarted. Only what is on disk of this very migration can answer: a record of
/// another attempt says nothing of what became of this one, so the source stays in doubt.
fn answer_from_record(hello: &Hello, context: &mut Context) -> Phase {
    let epoch = hello.epoch.next();
    // A record speaks of a VM under the name that it came by, which its source keeps for as long as it asks.
    let of_it = |record: &Record| record.vm == hello.vm && record.name == hello.name;
    let record = context.config.record.take().filter(of_it);
    if record.as_ref().is_some_and(|record| record.never_ran(hello.migration, epoch)) {
        let standing = TargetStanding::Receiving(epoch);
        let guest = Guest { vm: hello.vm, name: hello.name.clone(), migration: hello.migration, standing };
        let reason = "its source asked after a migration that was not finished here";
        return discard(guest, None, reason, context);
    }
    if record.is_some_and(|record| record.ran(hello.migration, epoch)) {
        context.send(Message::Running(Running { epoch, record_us: 0, run_us: 0 }));
        return refuse(None, "its source was told that the guest has been running here", context);
    }
    let text = format!("this host has no record of migration {}", hello.migration);
    refuse(Some(AbortCode::Epoch), &text, context)
}

/// The machine is being built.
#[derive(Debug, Clone)]
pub(super) struct Building {
    pub(super) guest: Guest,
    step: BuildStep,
    deadline: Timestamp,
    /// Whether digests of memory are taken and compared.
    verify: bool,
    /// Whether the source's data streams can prove themselves.
    proves: bool,
    /// Whether the source has shown that it has this target's witness, or there is none to have.
    witnessed: bool,
}

#[derive(Debug, Clone)]
enum BuildStep {
    AwaitingDescription,
    /// The record that this host is receiving is being written: rehearsing the one within the downtime.
    Recording {
        description: Vec<u8>,
        layout: MemoryLayout,
        memory: Memory,
    },
    /// The record is durable. Whether the witness answers is found out before anything moves.
    Probing {
        description: Vec<u8>,
        layout: MemoryLayout,
        memory: Memory,
        record: Duration,
    },
    Building {
        memory: Memory,
        record: Duration,
    },
}

/// How memory comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Page by page over this many data streams.
    Streams(u16),
    /// It is the source's own, mapped here.
    HandedOver,
}

impl Building {
    pub(super) fn on(mut self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        match (self.step, event) {
            (BuildStep::AwaitingDescription, Event::Message(Message::Witness(theirs))) => {
                self.step = BuildStep::AwaitingDescription;
                match is_same(context.config.witness, theirs) {
                    Ok(()) => self.witnessed = true,
                    Err(text) => return refuse(Some(AbortCode::Witness), &text, context),
                }
                Phase::Building(self)
            }
            (BuildStep::AwaitingDescription, Event::Message(Message::Describe(describe)))
                if self.witnessed =>
            {
                let Describe { description, regions, streams } = describe;
                self.step = BuildStep::AwaitingDescription;
                self.described(description, regions, Memory::Streams(streams), context)
            }
            (BuildStep::AwaitingDescription, Event::Message(Message::HandOver(hand_over)))
                if context.config.carries_descriptors && self.witnessed =>
            {
                let HandOver { description, regions } = hand_over;
                self.step = BuildStep::AwaitingDescription;
                self.described(description, regions, Memory::HandedOver, context)
            }
            (BuildStep::Recording { description, layout, memory }, Event::RecordWritten { took }) => {
                if context.config.witness.is_some() {
                    context.act(Action::ProbeWitness);
                    self.step = BuildStep::Probing { description, layout, memory, record: took };
                    return Phase::Building(self);
                }
                self.step = build(description, layout, memory, took, self.verify, context);
                Phase::Building(self)
            }
            (BuildStep::Probing { description, layout, memory, record }, Event::WitnessProbed { took }) => {
                self.step = build(description, layout, memory, record + took, self.verify, context);
                Phase::Building(self)
            }
            (step @ BuildStep::Probing { .. }, Event::WitnessSilent(reason)) => {
                self.step = step;
                self.give_up(Some(AbortCode::Witness), &no_witness(&reason), context)
            }
            (BuildStep::Building { memory, record }, Event::MachineBuilt) => {
                let record_us = u64::try_from(record.as_micros()).unwrap_or(u64::MAX);
                if let Memory::Streams(_) = memory {
                    context.admit(0);
                }
                context.send(Message::Ready(Ready { record_us }));
                context.act(Action::Report(Progress::Receiving));
                context.restart_liveness(now);
                Phase::Receiving(Box::new(Receiving::new(self.guest, memory)))
            }
            (step, event) => {
                self.step = step;
                self.on_other(event, context)
            }
        }
    }

    fn described(
        mut self,
        description: Vec<u8>,
        regions: Vec<Region>,
        memory: Memory,
        context: &mut Context,
    ) -> Phase {
        let layout = match MemoryLayout::new(regions) {
            Ok(layout) => layout,
            Err(error) => return refuse(Some(AbortCode::CannotBuild), &error.to_string(), context),
        };
        if matches!(memory, Memory::Streams(_)) && context.secret.is_some() && !self.proves {
            let text = "the source's data streams can't prove that they are its own; update ferry there";
            return refuse(Some(AbortCode::Version), text, context);
        }
        let standing = Standing::Receiving { source: context.config.source.clone() };
        context.act(Action::WriteRecord(self.guest.record(standing)));
        self.step = BuildStep::Recording { description, layout, memory };
        Phase::Building(self)
    }

    fn on_other(self, event: Event, context: &mut Context) -> Phase {
        if let Some((code, reason)) = failure(&event) {
            return self.give_up(code, &reason, context);
        }
        match event {
            Event::Message(Message::Ping(token)) => {
                context.send(Message::Pong(token));
                Phase::Building(self)
            }
            Event::Message(message) => {
                let text = format!("a {:?} message came while building", message.message_type());
                self.give_up(Some(AbortCode::Protocol), &text, context)
            }
            Event::Timeout if matches!(self.step, BuildStep::AwaitingDescription) => {
                self.give_up(Some(AbortCode::Timeout), "no Describe came in time", context)
            }
            _ => Phase::Building(self),
        }
    }

    fn give_up(self, code: Option<AbortCode>, reason: &str, context: &mut Context) -> Phase {
        match self.step {
            BuildStep::AwaitingDescription => refuse(code, reason, context),
            BuildStep::Recording { .. } | BuildStep::Probing { .. } | BuildStep::Building { .. } => {
                discard(self.guest, code, reason, context)
            }
        }
    }

    /// When the source should have said what to build.
    pub(super) const fn wake(&self) -> Option<Timestamp> {
        match self.step {
            BuildStep::AwaitingDescription => Some(self.deadline),
            BuildStep::Recording { .. } | BuildStep::Probing { .. } | BuildStep::Building { .. } => None,
        }
    }
}

/// Has the machine built. The record (and the witness) has taken `record`.
fn build(
    description: Vec<u8>,
    layout: MemoryLayout,
    memory: Memory,
    record: Duration,
    verify: bool,
    context: &mut Context,
) -> BuildStep {
    context.act(match memory {
        Memory::Streams(streams) => Action::BuildMachine { description, layout, streams, verify },
        Memory::HandedOver => Action::AdoptMemory { description, layout },
    });
    BuildStep::Building { memory, record }
}

/// What ends an attempt that is not prepared, with the code to tell the source if it is still there.
pub(super) fn failure(event: &Event) -> Option<(Option<AbortCode>, String)> {
    match event {
        Event::Message(Message::Abort(abort)) => Some((None, abort.sentence.clone())),
        Event::Disconnected(reason) => {
            Some((None, format!("the connection to the source was lost: {reason}")))
        }
        Event::BuildFailed { code, sentence } | Event::StreamFailed { code, sentence } => {
            Some((Some(*code), sentence.clone()))
        }
        Event::RestoreFailed(reason) => Some((Some(AbortCode::CannotRestore), reason.clone())),
        Event::RecordFailed(reason)
        | Event::RehearsalFailed(reason)
        | Event::RunFailed(reason)
        | Event::RunBroke(reason) => Some((Some(AbortCode::Internal), reason.clone())),
        Event::Cancel => Some((Some(AbortCode::Cancelled), "the target was told to give up".to_owned())),
        Event::Message(_)
        | Event::Reconnected
        | Event::MachineBuilt
        | Event::FenceReached { .. }
        | Event::StreamsEnded { .. }
        | Event::StateRestored { .. }
        | Event::RecordWritten { .. }
        | Event::RecordRehearsed { .. }
        | Event::VmRunning { .. }
        | Event::WitnessProbed { .. }
        | Event::WitnessSays(_)
        | Event::WitnessSilent(_)
        | Event::Timeout => None,
    }
}

/// The machine stands and its memory is arriving, unless it is the source's own.
#[derive(Debug, Clone)]
pub(super) struct Receiving {
    pub(super) guest: Guest,
    memory: Memory,
    /// For each fence that not all streams have reached: which have, with their digests.
    fences: BTreeMap<u32, BTreeMap<StreamIndex, MemoryDigest>>,
    /// The last fence that all streams have reached, and the digest of all pages by then.
    complete: (u32, MemoryDigest),
    state: Option<StateStep>,
    /// What is being measured anew, if anything.
    rehearsing: Option<Rehearsing>,
    prepare: Option<(Prepare, Timestamp)>,
    pages_complete_at: Option<Timestamp>,
    /// How long all this is kept if the connection breaks, if at all.
    keep_for: Option<Duration>,
    /// The number of the data streams that are let in.
    session: u32,
    /// What the source was told last of what has arrived of a round, and which.
    pub(super) told: Option<(u32, PageBitmap)>,
}

/// The state is restored only once memory is complete and equal: restoring reads guest memory (page tables), which must
/// not be done to pages that are still arriving. It must not write to it: memory that was handed over is the source's.
#[derive(Debug, Clone)]
enum StateStep {
    Arrived(State),
    Restoring { network: NetworkIdentity, runs: bool },
}

/// More fences under way than this means that a peer sends them without any order.
const FENCES_MAX: usize = 16;

impl Receiving {
    fn new(guest: Guest, memory: Memory) -> Self {
        Self {
            guest,
            memory,
            fences: BTreeMap::new(),
            complete: (0, MemoryDigest::ZERO),
            state: None,
            rehearsing: None,
            prepare: None,
            pages_complete_at: None,
            keep_for: None,
            session: 0,
            told: None,
        }
    }

    pub(super) fn on(mut self: Box<Self>, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        let event = match loss(event) {
            Ok((loss, reason)) => return interrupted::begin(self, loss, reason, now, context),
            Err(event) => event,
        };
        if let Some((code, reason)) = failure(&event) {
            return discard(self.guest, code, &reason, context);
        }
        match (event, &self.state) {
            (Event::FenceReached { stream, fence, digest }, _) => {
                match self.fence(stream, fence, digest, now) {
                    Ok(true) => context.send(Message::FenceReached(FenceReached { fence })),
                    Ok(false) => {}
                    Err(reason) => return discard(self.guest, Some(AbortCode::Protocol), &reason, context),
                }
            }
            (Event::Message(Message::KeepFor(KeepFor { wait_ms })), _)
                if matches!(self.memory, Memory::Streams(_)) =>
            {
                let asked = Duration::from_millis(u64::from(wait_ms));
                self.keep_for = Some(asked.min(KEEP_MAX) + KEEP_MARGIN);
            }
            (Event::Message(Message::Stopping(_)), _) => context.act(Action::DropStaleFrames),
            (Event::Message(Message::Ping(token)), _) => context.send(Message::Pong(token)),
            // That which was begun before the link broke answers this one too.
            (Event::Message(Message::Rehearse(Rehearse)), None) if self.rehearsing.is_some() => {}
            (Event::Message(Message::Rehearse(Rehearse)), None) => {
                self.rehearsing = Some(Rehearsing::Record);
                let standing = Standing::Receiving { source: context.config.source.clone() };
                context.act(Action::RehearseRecord(self.guest.record(standing)));
            }
            (Event::RecordRehearsed { took } | Event::WitnessProbed { took }, _) => {
                self.rehearsing = self.rehearsing.and_then(|step| step.measured(took, context));
            }
            (Event::WitnessSilent(reason), _) if self.rehearsing.is_some() => {
                return discard(self.guest, Some(AbortCode::Witness), &no_witness(&reason), context);
            }
            (Event::Message(Message::State(state)), None) => self.state = Some(StateStep::Arrived(state)),
            (Event::StateRestored { took }, Some(StateStep::Restoring { .. })) => {
                return self.prepared(took, now, context);
            }
            (Event::Message(Message::Prepare(prepare)), _)
                if self.prepare.is_none() && self.has_place_for(&prepare) =>
            {
                self.prepare = Some((prepare, now));
            }
            (Event::Message(message), _) => {
                let text = format!("a {:?} message has no place while receiving", message.message_type());
                return discard(self.guest, Some(AbortCode::Protocol), &text, context);
            }
            _ => {}
        }
        self.restore_if_complete(context)
    }

    /// Memory that was handed over has no fences and no digest, so nothing would ever come of one that is named.
    fn has_place_for(&self, prepare: &Prepare) -> bool {
        match self.memory {
            Memory::Streams(_) => true,
            Memory::HandedOver => (prepare.fence, prepare.digest) == (0, MemoryDigest::ZERO),
        }
    }

    /// A stream has reached a fence; true if all of them have now.
    pub(super) fn fence(
        &mut self,
        stream: StreamIndex,
        fence: u32,
        digest: MemoryDigest,
        now: Timestamp,
    ) -> Result<bool, String> {
        let reached = self.fences.entry(fence).or_default();
        if fence <= self.complete.0 || reached.insert(stream, digest).is_some() {
            return Err(format!("fence {fence} came twice on data stream {}", stream.number()));
        }
        if Memory::Streams(u16::try_from(reached.len()).unwrap_or(u16::MAX)) == self.memory {
            let sum = reached.values().copied().fold(MemoryDigest::ZERO, MemoryDigest::combine);
            self.fences.remove(&fence);
            self.complete = (fence, sum);
            self.pages_complete_at = Some(now);
            return Ok(true);
        }
        if self.fences.len() > FENCES_MAX {
            return Err(format!("more than {FENCES_MAX} fences are under way"));
        }
        Ok(false)
    }

    /// How long it is kept if the connection breaks, if at all.
    pub(super) const fn keep_for(&self) -> Option<Duration> {
        self.keep_for
    }

    /// Whether the state is being restored: memory must not change until that is over.
    pub(super) const fn is_restoring(&self) -> bool {
        matches!(self.state, Some(StateStep::Restoring { .. }))
    }

    /// The last fence that all streams have reached.
    pub(super) const fn reached(&self) -> u32 {
        self.complete.0
    }

    /// The digest of all pages by then, or when the streams had ended.
    pub(super) const fn digest(&self) -> MemoryDigest {
        self.complete.1
    }

    /// The guest runs at the source again: its state and what was to follow it are void.
    pub(super) fn forget_standstill(&mut self) {
        (self.state, self.prepare, self.pages_complete_at) = (None, None, None);
    }

    /// The record is written once more, for nobody.
    pub(super) const fn rehearsed(&mut self) {
        self.rehearsing = None;
    }

    /// All streams have ended: fences that only some have reached never come, and this is memory's digest.
    pub(super) fn rebase(&mut self, digest: MemoryDigest) {
        self.fences.clear();
        self.complete.1 = digest;
    }

    /// Whether a source that asks this takes up what is here: its streams are newer than those that were let in.
    pub(super) const fn is_next(&self, resume: &Resume) -> bool {
        resume.session > self.session
    }

    /// The source was told what is here, and goes on with the streams of this number.
    pub(super) fn resumed(&mut self, session: u32, told: (u32, PageBitmap)) {
        (self.session, self.told) = (session, Some(told));
    }

    /// Compares digests and restores the state, as soon as everything is here.
    fn restore_if_complete(mut self: Box<Self>, context: &mut Context) -> Phase {
        let (Some((prepare, _)), Some(StateStep::Arrived(_))) = (&self.prepare, &self.state) else {
            return Phase::Receiving(self);
        };
        // A rehearsal that is still under way writes `Receiving`: what comes after the restoring must find it done.
        if self.complete.0 < prepare.fence || self.rehearsing.is_some() {
            return Phase::Receiving(self);
        }
        let (theirs, own) = (prepare.digest, self.complete.1);
        if own != theirs {
            let text = format!(
                "the two memories differ (digest {theirs} at the source, {own} at the target); \
                 the guest goes on at the source"
            );
            return discard(self.guest, Some(AbortCode::DigestDiffers), &text, context);
        }
        if let Some(StateStep::Arrived(State { state, network, runs })) = self.state.take() {
            context.act(Action::RestoreState(state));
            self.state = Some(StateStep::Restoring { network, runs });
        }
        Phase::Receiving(self)
    }

    /// Everything is here, equal and restored.
    fn prepared(mut self: Box<Self>, restore: Duration, now: Timestamp, context: &mut Context) -> Phase {
        let (Some((prepare, asked_at)), Some(StateStep::Restoring { network, runs })) =
            (self.prepare.take(), self.state.take())
        else {
            unreachable!("the state is restored only once all of it is here");
        };
        self.guest.standing = match self.guest.standing.prepared(prepare.epoch) {
            Ok(standing) => standing,
            Err(error) => return discard(self.guest, Some(AbortCode::Epoch), &error.to_string(), context),
        };
        let wait = self.pages_complete_at.map_or(Duration::ZERO, |at| at.since(asked_at));
        context.send(Message::Prepared(Prepared {
            epoch: prepare.epoch,
            digest: self.digest(),
            wait_us: micros(wait),
            restore_us: micros(restore),
        }));
        if matches!(self.memory, Memory::Streams(_)) {
            // Nothing that the source sends from now on may reach the guest's memory.
            context.act(Action::EndStreams);
        }
        context.act(Action::Report(Progress::Prepared));
        handover::prepared(self, network, runs, now)
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
