//! The source's table.

use std::time::Duration;

use ferry_protocol::message::{
    Abort, AbortCode, Arrived, AtEpoch, Describe, FenceReached, HandOver, Hello, KeepFor, NetworkIdentity,
    Prepare, Prepared, Ready, Rehearse, Rehearsed, Resume, Run, Running, State, Welcome,
};
use ferry_protocol::negotiation::Features;
use ferry_protocol::page::Compression;
use ferry_protocol::source::{
    Action, Config, Event, MemoryPath, OnTimeout, Outcome, Progress, Resolution, RoundSent, Source,
};
use ferry_protocol::witness::Ruling;
use ferry_protocol::{
    Epoch, MemoryDigest, MemoryLayout, Message, MigrationId, PageBitmap, Region, Timestamp, VmId, WitnessId,
};

use super::{Core, part};

pub(super) const WITNESS: WitnessId = WitnessId([9; 16]);

const MS: Duration = Duration::from_millis(1);

struct Stepped {
    core: Source,
    now: Timestamp,
}

impl std::fmt::Debug for Stepped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

impl Core for Stepped {
    type Event = Event;

    fn phase(&self) -> &'static str {
        self.core.phase()
    }

    fn take(&mut self, event: Event) -> Vec<String> {
        self.now = self.now + MS;
        let timed = event == Event::Timeout;
        let now = self.core.poll_timeout().filter(|_| timed).unwrap_or(self.now);
        self.core.handle(now, event);
        std::iter::from_fn(|| self.core.poll_action()).map(|action| word(&action)).collect()
    }
}

fn word(action: &Action) -> String {
    match action {
        Action::Connect { delay } => format!("Connect after {} ms", delay.as_millis()),
        Action::Send(Message::Abort(abort)) => format!("Send Abort {:?}", abort.code),
        Action::Send(message) => format!("Send {:?}", message.message_type()),
        Action::SendMemory(message) => format!("SendMemory {:?}", message.message_type()),
        Action::OpenStreams { verify } => format!("OpenStreams{}", if *verify { "" } else { ", unverified" }),
        Action::CloseStreams => "CloseStreams".to_owned(),
        Action::StartDirtyLog => "StartDirtyLog".to_owned(),
        Action::ReadDirtyLog => "ReadDirtyLog".to_owned(),
        Action::StopDirtyLog => "StopDirtyLog".to_owned(),
        Action::ReopenStreams { verify, session, lacking } => format!(
            "ReopenStreams {session}, {} pages lacking{}",
            lacking.count(),
            if *verify { "" } else { ", unverified" }
        ),
        Action::SendPages { pages, fence, paused, first: _, whole: _ } => {
            format!(
                "SendPages({} pages, fence {fence}{})",
                pages.count(),
                if *paused { ", paused" } else { "" }
            )
        }
        Action::PauseVm => "PauseVm".to_owned(),
        Action::SaveState => "SaveState".to_owned(),
        Action::ResumeVm => "ResumeVm".to_owned(),
        Action::ReleaseVm => "ReleaseVm".to_owned(),
        Action::WriteRecord(record) => format!("WriteRecord {} {}", record.standing.word(), record.epoch),
        Action::AskWitness(claim) => format!("AskWitness {:?} {}", claim.wish, claim.epoch),
        Action::RehearseRecord(record) => {
            format!("RehearseRecord {} {}", record.standing.word(), record.epoch)
        }
        Action::Report(progress) => format!("Report {}", progress_word(progress)),
        Action::Finish(Outcome::LetGo { epoch }) => format!("Finish LetGo {epoch}"),
        Action::Finish(Outcome::Moved(summary)) => format!("Finish Moved {}", summary.epoch),
        Action::Finish(Outcome::Stayed { epoch, .. }) => format!("Finish Stayed {epoch}"),
    }
}

const fn progress_word(progress: &Progress) -> &'static str {
    match progress {
        Progress::Negotiated { .. } => "Negotiated",
        Progress::RoundStarted { .. } => "RoundStarted",
        Progress::RoundDone(_) => "RoundDone",
        Progress::Reconnecting { .. } => "Reconnecting",
        Progress::Reconnected(_) => "Reconnected",
        Progress::Stopping { .. } => "Stopping",
        Progress::Paused => "Paused",
        Progress::Handed => "Handed",
        Progress::InDoubt { .. } => "InDoubt",
        Progress::Undoing { .. } => "Undoing",
    }
}

/// The guest has 512 pages and epoch 1; epoch 2 is what its target would run.
const PAGES: u64 = 512;

fn config(on_timeout: OnTimeout) -> Config {
    Config {
        migration: MigrationId([7; 16]),
        vm: VmId([1; 16]),
        name: "web".parse().unwrap(),
        epoch: Epoch::FIRST,
        arrived_by: None,
        target: "b:4444".to_owned(),
        witness: None,
        description: vec![1],
        memory: MemoryPath::Streams,
        streams: 1,
        compression: Compression::Lz4,
        verify: true,
        verify_whole: false,
        downtime_budget: 50 * MS,
        timeout: Duration::from_secs(60),
        on_timeout,
        reconnect: Duration::from_secs(30),
    }
}

pub(super) fn at(epoch: u64) -> AtEpoch {
    AtEpoch { epoch: Epoch::new(epoch) }
}

fn log(count: u64) -> Event {
    let mut pages = PageBitmap::empty(PAGES);
    (0..count).for_each(|page| pages.insert(page));
    Event::DirtyLogRead { pages, took: MS }
}

fn welcome(version: u16, features: Features) -> Event {
    Event::Message(Message::Welcome(Welcome { version, features, host: "b".to_owned() }))
}

fn fence(fence: u32) -> Event {
    Event::Message(Message::FenceReached(FenceReached { fence }))
}

fn saved() -> Event {
    Event::StateSaved { state: vec![5], network: NetworkIdentity::default(), runs: true, took: MS }
}

fn prepared(epoch: u64, digest: MemoryDigest) -> Event {
    let epoch = Epoch::new(epoch);
    Event::Message(Message::Prepared(Prepared { epoch, digest, wait_us: 0, restore_us: 9 }))
}

fn running(epoch: u64) -> Event {
    Event::Message(Message::Running(Running { epoch: Epoch::new(epoch), record_us: 1, run_us: 2 }))
}

fn arrived(reached: u32) -> Event {
    Event::Message(Message::Arrived(Arrived { reached, runs: vec![Run { first: 3, count: 4 }], next: None }))
}

fn abort() -> Event {
    Event::Message(Message::Abort(Abort::new(AbortCode::Cancelled, "no")))
}

fn other_digest() -> MemoryDigest {
    super::target::digest()
}

/// The events on the way from the start to the end, with the name of the step that each leaves.
fn way() -> Vec<(&'static str, Event)> {
    let ready = Event::Message(Message::Ready(Ready { record_us: 1 }));
    let record = || Event::RecordWritten { took: MS };
    let rehearsed = Event::Message(Message::Rehearsed(Rehearsed { record_us: 1 }));
    vec![
        ("", Event::Connected),
        ("Hello is sent", welcome(1, without_pings())),
        ("Describe is sent", ready),
        ("", Event::StreamsOpened),
        ("the record is being rehearsed", Event::RecordRehearsed { took: MS }),
        ("the log is being switched on", Event::DirtyLogStarted),
        ("the first log is being read", log(0)),
        ("round 1 is being sent, both records are rehearsed", rehearsed),
        ("round 1 is being sent", Event::RoundSent(RoundSent::default())),
        ("round 1 is written and has not arrived", fence(1)),
        ("the log of round 1 is being read", log(7)),
        ("the guest is being paused", Event::Paused),
        ("the last log is being read", log(2)),
        ("the last pages and the state are under way", Event::RoundSent(RoundSent::default())),
        ("the last pages are written, the state is not saved", saved()),
        ("Prepare is sent", prepared(2, MemoryDigest::ZERO)),
        ("", record()),
        ("Commit is sent", running(2)),
        ("", record()),
        ("", Event::Cancel),
    ]
}

/// Without them a time-out is the phase's own.
fn without_pings() -> Features {
    Features::OURS.without(Features::KEEPALIVE)
}

/// The way of a migration within one host, as far as it differs.
fn local_way() -> Vec<(&'static str, Event)> {
    let ready = Event::Message(Message::Ready(Ready { record_us: 1 }));
    vec![
        ("", Event::Connected),
        ("Hello is sent", welcome(1, Features::ours_on(true).without(Features::KEEPALIVE))),
        ("HandOver is sent", Event::RecordWritten { took: MS }),
        ("the record is rehearsed", Event::Message(Message::Pong(1))),
        ("the round trip is measured, too", ready),
        ("the guest is being paused", Event::Paused),
        ("the state is being saved", saved()),
        ("Prepare is sent", prepared(2, MemoryDigest::ZERO)),
        ("", Event::RecordWritten { took: MS }),
        ("Commit is sent", running(2)),
    ]
}

/// Ways that leave the main one: after which of its steps, by which events, and where they lead.
fn side_ways() -> Vec<(usize, Vec<Event>, &'static str)> {
    let lost = || Event::Disconnected("reset".to_owned());
    let discarded = Event::Message(Message::Discarded(at(2)));
    vec![
        (
            10,
            vec![log(PAGES), Event::RoundSent(RoundSent::default()), fence(2)],
            "round 2 was quick, so it rests",
        ),
        (13, vec![saved()], "the state is sent, the last pages are not written"),
        (17, vec![lost()], "the connection is lost, another is being made"),
        (17, vec![Event::Resolve(Resolution::Resume)], "the operator has taken it back"),
        (17, vec![Event::Resolve(Resolution::Discard)], "the operator has let go of it"),
        (17, vec![lost(), Event::Connected], "Commit is sent again"),
        (17, vec![discarded], "the target had discarded it"),
        (8, vec![Event::Cancel], "it was cancelled while the guest ran"),
        (16, vec![Event::RecordFailed("full".to_owned())], "the commit could not be recorded"),
        (16, vec![Event::Cancel], "it was cancelled before the commit was sent"),
        (8, vec![lost()], "the link broke while round 1 was being sent"),
        (
            8,
            vec![Event::StreamFailed("reset".to_owned())],
            "a data stream broke while round 1 was being sent",
        ),
        (8, vec![lost(), Event::Connected], "what has arrived is asked"),
        (8, vec![lost(), Event::Connected, arrived(0)], "the streams are opened anew"),
        (12, vec![lost()], "the link broke while the last log was being read"),
        (
            12,
            vec![lost(), Event::Connected, arrived(1), Event::StreamsOpened],
            "the streams stand anew; the log and the guest's resuming are awaited",
        ),
        (15, vec![lost(), Event::Connected], "the link broke while preparing, what has arrived is asked"),
    ]
}

fn events() -> Vec<(String, Event)> {
    let mut events: Vec<(String, Event)> = [
        ("Connected", Event::Connected),
        ("Disconnected", Event::Disconnected("reset".to_owned())),
        ("StreamsOpened", Event::StreamsOpened),
        ("StreamFailed", Event::StreamFailed("reset".to_owned())),
        ("DirtyLogStarted", Event::DirtyLogStarted),
        ("DirtyLogRead(few)", log(3)),
        ("DirtyLogRead(all)", log(PAGES)),
        ("RoundSent", Event::RoundSent(RoundSent::default())),
        ("Paused", Event::Paused),
        ("StateSaved", saved()),
        ("RecordWritten", Event::RecordWritten { took: MS }),
        ("RecordRehearsed", Event::RecordRehearsed { took: MS }),
        ("RehearsalFailed", Event::RehearsalFailed("full".to_owned())),
        ("RecordFailed", Event::RecordFailed("full".to_owned())),
        ("VmFailed", Event::VmFailed("KVM said no".to_owned())),
        ("VmResumed", Event::VmResumed),
        ("ResumeFailed", Event::ResumeFailed("KVM said no".to_owned())),
        ("Cancel", Event::Cancel),
        ("Timeout", Event::Timeout),
        ("WitnessSays(Target)", Event::WitnessSays(Ruling::Target)),
        ("WitnessSays(Source)", Event::WitnessSays(Ruling::Source)),
        ("WitnessSilent", Event::WitnessSilent("no route".to_owned())),
        ("Resolve(Resume)", Event::Resolve(Resolution::Resume)),
        ("Resolve(ResumeAlone)", Event::Resolve(Resolution::ResumeAlone)),
        ("Resolve(Discard)", Event::Resolve(Resolution::Discard)),
        ("Welcome", welcome(1, Features::OURS)),
        ("Welcome(version 9)", welcome(9, Features::OURS)),
        ("Welcome(hand over)", welcome(1, Features::ours_on(true))),
        ("Welcome(no lz4)", welcome(1, Features::NONE)),
        ("FenceReached(1)", fence(1)),
        ("FenceReached(9)", fence(9)),
        ("Prepared(2)", prepared(2, MemoryDigest::ZERO)),
        ("Prepared(2, other digest)", prepared(2, other_digest())),
        ("Prepared(9)", prepared(9, MemoryDigest::ZERO)),
        ("Running(2)", running(2)),
        ("Running(9)", running(9)),
        ("Abort", abort()),
        ("Arrived(0)", arrived(0)),
        ("Arrived(1)", arrived(1)),
        ("Arrived(9)", arrived(9)),
    ]
    .map(|(name, event)| (name.to_owned(), event))
    .into();
    events.extend(super::other_messages());
    events
}

/// The messages that only a source sends, and plain ones.
pub(super) fn messages_of_a_source() -> Vec<(&'static str, Message)> {
    vec![
        ("Hello", Message::Hello(hello())),
        ("Describe", Message::Describe(Describe { description: vec![1], regions: regions(), streams: 1 })),
        ("HandOver", Message::HandOver(hand_over())),
        ("Witness", Message::Witness(WITNESS)),
        ("Stopping", Message::Stopping(at(1))),
        ("State", Message::State(State { state: vec![5], network: NetworkIdentity::default(), runs: true })),
        ("Prepare", Message::Prepare(Prepare { epoch: Epoch::new(2), fence: 1, digest: MemoryDigest::ZERO })),
        ("Commit", Message::Commit(at(2))),
        ("Released", Message::Released(at(2))),
        ("Ping", Message::Ping(1)),
        ("Rehearse", Message::Rehearse(Rehearse)),
        ("KeepFor", Message::KeepFor(KeepFor { wait_ms: 30_000 })),
        ("Resume(1)", Message::Resume(resume(1))),
    ]
}

pub(super) fn resume(session: u32) -> Resume {
    Resume { epoch: Epoch::new(2), session, reached: 0, round: 1, from: 0 }
}

pub(super) fn hand_over() -> HandOver {
    HandOver { description: vec![1], regions: regions() }
}

pub(super) fn hello() -> Hello {
    Hello {
        version_oldest: 1,
        version_newest: 1,
        features: Features::OURS.without(Features::UNVERIFIED).without(Features::KEEPALIVE),
        migration: MigrationId([7; 16]),
        vm: VmId([1; 16]),
        name: "web".parse().unwrap(),
        epoch: Epoch::FIRST,
        resumes: false,
    }
}

pub(super) fn regions() -> Vec<Region> {
    vec![Region { gpa: 0, bytes: PAGES * 4096 }]
}

fn along(steps: usize, then: &[Event], on_timeout: OnTimeout) -> Stepped {
    let events = way().into_iter().take(steps).map(|(_, event)| event).chain(then.iter().cloned());
    stepped(config(on_timeout), events)
}

fn along_local(steps: usize, then: &[Event], on_timeout: OnTimeout) -> Stepped {
    let events = local_way().into_iter().take(steps).map(|(_, event)| event).chain(then.iter().cloned());
    stepped(Config { memory: MemoryPath::HandedOver, ..config(on_timeout) }, events)
}

fn stepped(config: Config, events: impl Iterator<Item = Event>) -> Stepped {
    let layout = MemoryLayout::new(regions()).unwrap();
    let core = Source::new(config, layout, Timestamp::default());
    let mut source = Stepped { core, now: Timestamp::default() };
    while source.core.poll_action().is_some() {}
    for event in events {
        source.take(event);
    }
    source
}

pub(super) fn table() -> String {
    let mut text = String::new();
    for (steps, (name, _)) in way().into_iter().enumerate() {
        text += &part(name, || along(steps, &[], OnTimeout::Cancel), &events());
    }
    for (steps, then, name) in side_ways() {
        text += &part(name, || along(steps, &then, OnTimeout::Cancel), &events());
    }
    let timeout = [("Timeout".to_owned(), Event::Timeout)];
    let pinging = |ticks: usize| {
        let mut events: Vec<Event> = way().into_iter().take(4).map(|(_, event)| event).collect();
        events[1] = welcome(1, Features::OURS);
        events.extend(std::iter::repeat_n(Event::Timeout, ticks));
        stepped(config(OnTimeout::Cancel), events.into_iter())
    };
    text += &part("a target that answers pings", || pinging(0), &timeout);
    text += &part("a target that has not answered five pings", || pinging(5), &timeout);
    let quick = [log(PAGES), Event::RoundSent(RoundSent::default()), fence(2)];
    text += &part("round 1 is being sent, on-timeout stop", || along(8, &[], OnTimeout::Stop), &timeout);
    text += &part("it rests, on-timeout stop", || along(10, &quick, OnTimeout::Stop), &timeout);
    text
}

/// The source of a migration within one host.
pub(super) fn table_of_local() -> String {
    let mut text = String::new();
    for (steps, (name, _)) in local_way().into_iter().enumerate().filter(|(steps, _)| *steps != 0) {
        text += &part(name, || along_local(steps, &[], OnTimeout::Cancel), &events());
    }
    // A record that takes a second at the target can't fit any budget of 50 ms.
    let slow = [Event::Message(Message::Ready(Ready { record_us: 1_000_000 }))];
    let name = "it does not fit the budget, so it rests";
    text += &part(name, || along_local(4, &slow, OnTimeout::Cancel), &events());
    let measured_again = [
        ("RecordWritten", Event::RecordWritten { took: MS }),
        ("Pong", Event::Message(Message::Pong(1))),
        ("Timeout", Event::Timeout),
    ]
    .map(|(name, event)| (name.to_owned(), event));
    let again = [slow[0].clone(), Event::Timeout, Event::RecordWritten { took: MS }];
    text += &part("it measures again", || along_local(4, &again, OnTimeout::Cancel), &measured_again);
    text
}
