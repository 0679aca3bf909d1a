//! The target's table.

use std::time::Duration;

use ferry_protocol::admission::JoinSecret;
use ferry_protocol::message::{
    Abort, AbortCode, Admit, Arrived, Describe, FenceReached, Hello, KeepFor, NetworkIdentity, Prepare,
    Prepared, Ready, Rehearse, Rehearsed, Run, Running, State, Welcome,
};
use ferry_protocol::negotiation::Features;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::target::{Action, Config, Event, Outcome, Progress, Target};
use ferry_protocol::witness::Ruling;
use ferry_protocol::{
    Epoch, MemoryDigest, Message, MigrationId, PAGE_BYTES, PageBitmap, PageDigest, Region, StreamIndex,
    Timestamp, VmId, WitnessId,
};

use super::source::{WITNESS, at, hand_over, hello, regions, resume};
use super::{Core, part};

const MS: Duration = Duration::from_millis(1);

struct Stepped {
    core: Target,
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
        Action::Send(Message::Abort(abort)) => format!("Send Abort {:?}", abort.code),
        Action::Send(message) => format!("Send {:?}", message.message_type()),
        Action::WriteRecord(record) => format!("WriteRecord {} {}", record.standing.word(), record.epoch),
        Action::AdoptMemory { .. } => "AdoptMemory".to_owned(),
        Action::ProbeWitness => "ProbeWitness".to_owned(),
        Action::AskWitness(claim) => format!("AskWitness {:?} {}", claim.wish, claim.epoch),
        Action::RehearseRecord(record) => {
            format!("RehearseRecord {} {}", record.standing.word(), record.epoch)
        }
        Action::BuildMachine { verify, .. } => {
            format!("BuildMachine{}", if *verify { "" } else { ", unverified" })
        }
        Action::EndStreams => "EndStreams".to_owned(),
        Action::ExpectStreams { session, digest: _ } => format!("ExpectStreams {session}"),
        Action::HangUp => "HangUp".to_owned(),
        Action::DropStaleFrames => "DropStaleFrames".to_owned(),
        Action::RestoreState(_) => "RestoreState".to_owned(),
        Action::RunVm { runs } => format!("RunVm(runs: {runs})"),
        Action::Announce(_) => "Announce".to_owned(),
        Action::DiscardMachine => "DiscardMachine".to_owned(),
        Action::Report(progress) => format!("Report {}", progress_word(progress)),
        Action::Finish(Outcome::Running { epoch, .. }) => format!("Finish Running {epoch}"),
        Action::Finish(Outcome::Discarded { .. }) => "Finish Discarded".to_owned(),
    }
}

const fn progress_word(progress: &Progress) -> &'static str {
    match progress {
        Progress::Greeted { .. } => "Greeted",
        Progress::Receiving => "Receiving",
        Progress::Interrupted { .. } => "Interrupted",
        Progress::Prepared => "Prepared",
        Progress::Running => "Running",
        Progress::CannotRun { .. } => "CannotRun",
        Progress::GivenUp { .. } => "GivenUp",
        Progress::InDoubt => "InDoubt",
        Progress::WitnessSilent { .. } => "WitnessSilent",
    }
}

/// A digest that is not that of no page.
pub(super) fn digest() -> MemoryDigest {
    PageDigest::of(0, &[1; PAGE_BYTES]).alone()
}

fn fence(number: u32) -> Event {
    let stream = StreamIndex::new(0, 1).unwrap();
    Event::FenceReached { stream, fence: number, digest: MemoryDigest::ZERO }
}

fn describe(regions: Vec<Region>) -> Event {
    Event::Message(Message::Describe(Describe { description: vec![1], regions, streams: 1 }))
}

fn state(runs: bool) -> Event {
    Event::Message(Message::State(State { state: vec![5], network: NetworkIdentity::default(), runs }))
}

fn prepare(epoch: u64, fence: u32, digest: MemoryDigest) -> Event {
    Event::Message(Message::Prepare(Prepare { epoch: Epoch::new(epoch), fence, digest }))
}

fn commit(epoch: u64) -> Event {
    Event::Message(Message::Commit(at(epoch)))
}

fn greeting(hello: Hello) -> Event {
    Event::Message(Message::Hello(hello))
}

fn way() -> Vec<(&'static str, Event)> {
    let record = || Event::RecordWritten { took: MS };
    vec![
        ("no record of the VM", greeting(hello())),
        ("Welcome is sent", describe(regions())),
        ("the record is being written", record()),
        ("the machine is being built", Event::MachineBuilt),
        ("nothing has arrived", fence(1)),
        ("fence 1 is reached", state(true)),
        ("the state is here, Prepare is awaited", prepare(2, 1, MemoryDigest::ZERO)),
        ("memory is equal, the state is being restored", restored()),
        ("", commit(2)),
        ("", record()),
        ("", Event::VmRunning { took: MS }),
        ("", Event::Message(Message::Released(at(2)))),
        ("", Event::Cancel),
    ]
}

fn hello_with_witness() -> Hello {
    Hello { features: hello().features.and(Features::WITNESS), ..hello() }
}

/// The way of a migration with a witness.
fn witnessed_way() -> Vec<(&'static str, Event)> {
    let record = || Event::RecordWritten { took: MS };
    let no = || "no".to_owned();
    vec![
        ("this target has a witness", greeting(hello_with_witness())),
        ("the source has one too", Event::Message(Message::Witness(WITNESS))),
        ("it is the same witness", describe(regions())),
        ("", record()),
        ("the witness is being probed", Event::WitnessProbed { took: MS }),
        ("", Event::MachineBuilt),
        ("", Event::Message(Message::Rehearse(Rehearse))),
        ("", Event::RecordRehearsed { took: MS }),
        ("the record is rehearsed, the witness is being probed", Event::WitnessProbed { took: MS }),
        ("", fence(1)),
        ("", state(true)),
        ("", prepare(2, 1, MemoryDigest::ZERO)),
        ("", Event::StateRestored { took: MS }),
        ("it is prepared", commit(2)),
        ("the witness is asked", Event::WitnessSilent(no())),
        ("the witness is silent", Event::WitnessSays(Ruling::Target)),
        ("it has leave, which is being recorded", Event::RecordFailed(no())),
        ("that can't be recorded, the source is asked whether it lives", Event::Message(Message::Pong(0))),
        (WITHDRAWING, record()),
        ("the witness is asked to take its leave back", Event::WitnessSays(Ruling::Target)),
        ("the source has let go, it is recorded again", record()),
        ("it is being started", Event::RunFailed(no())),
        ("it could not be started, the source is asked whether it lives", Event::Message(Message::Pong(0))),
        ("the source lives, that it does not run here is being recorded", record()),
        ("the witness is asked to take the leave to start it back", Event::WitnessSays(Ruling::Source)),
        ("that it never runs here is being recorded", record()),
    ]
}

const WITHDRAWING: &str = "the source lives, that it does not run here is being recorded";

/// The target has not been heard by the witness yet, which has told the source that the guest is the target's.
#[test]
fn a_source_that_lets_go_while_the_target_gives_up_leaves_it_the_guest() {
    let released = || Event::Message(Message::Released(at(2)));
    let again = "WriteRecord running 2";
    let withdrawing = witnessed_way().iter().position(|(name, _)| *name == WITHDRAWING).unwrap();
    // What is being written must not be taken for what comes after it.
    for end in [Event::RecordWritten { took: MS }, Event::RecordFailed("full".to_owned())] {
        let mut target = witnessed(withdrawing);
        assert_eq!(target.take(released()), Vec::<String>::new());
        assert_eq!(target.take(end), [again]);
    }
    let mut asking = witnessed(withdrawing + 1);
    assert_eq!(asking.take(released()), [again]);
    assert_eq!(asking.take(Event::RecordWritten { took: MS }), ["RunVm(runs: true)"]);
}

fn witnessed(steps: usize) -> Stepped {
    let events = witnessed_way().into_iter().take(steps).map(|(_, event)| event);
    stepped_with(Some(WITNESS), false, events, None)
}

/// The way of a migration within one host, as far as it differs.
fn local_way() -> Vec<(&'static str, Event)> {
    let features = Features::ours_on(true).without(Features::KEEPALIVE);
    vec![
        ("no record of the VM, descriptors can come", greeting(Hello { features, ..hello() })),
        ("Welcome is sent", Event::Message(Message::HandOver(hand_over()))),
        ("the record is being written", Event::RecordWritten { took: MS }),
        ("the machine is being built on the source's memory", Event::MachineBuilt),
        ("the state is awaited", state(true)),
        ("the state is here, Prepare is awaited", prepare(2, 0, MemoryDigest::ZERO)),
        ("the state is being restored", Event::StateRestored { took: MS }),
        ("", commit(2)),
    ]
}

fn keep_for() -> Event {
    Event::Message(Message::KeepFor(KeepFor { wait_ms: 30_000 }))
}

fn resumed(session: u32) -> Event {
    Event::Message(Message::Resume(resume(session)))
}

fn broken_stream() -> Event {
    Event::StreamFailed { code: AbortCode::Internal, sentence: "reset".to_owned() }
}

fn restored() -> Event {
    Event::StateRestored { took: MS }
}

fn ended() -> Event {
    Event::StreamsEnded { arrived: PageBitmap::empty(512), digest: MemoryDigest::ZERO }
}

fn side_ways() -> Vec<(usize, Vec<Event>, &'static str)> {
    let lost = || Event::Disconnected("reset".to_owned());
    vec![
        (5, vec![prepare(2, 1, MemoryDigest::ZERO)], "Prepare is here, the state is awaited"),
        (6, vec![prepare(2, 9, MemoryDigest::ZERO)], "everything but fence 9 is here"),
        (8, vec![lost()], "the connection is lost"),
        (5, vec![Event::Message(Message::Rehearse(Rehearse))], "the record is being rehearsed"),
        (4, vec![keep_for()], "it is to be kept"),
        (6, vec![keep_for()], "it is to be kept, the state is here"),
        (7, vec![keep_for()], "it is to be kept, the state is being restored"),
        (4, vec![keep_for(), lost()], "the connection was lost"),
        (4, vec![keep_for(), broken_stream()], "a stream was lost"),
        (4, vec![keep_for(), lost(), ended()], "the connection was lost and the streams have ended"),
        (4, vec![keep_for(), lost(), Event::Reconnected, resumed(1)], "what has arrived is asked"),
        (4, vec![keep_for(), lost(), ended(), Event::Reconnected, resumed(1)], "it was taken up"),
        (
            7,
            vec![keep_for(), lost(), ended(), Event::Reconnected, resumed(1)],
            "what has arrived is asked, the state is still being restored",
        ),
        (7, vec![keep_for(), restored()], "it is prepared and to be kept"),
        (7, vec![keep_for(), restored(), ended()], "it is prepared and to be kept, the streams have ended"),
        (5, vec![Event::Cancel], "it was told to give up"),
        (9, vec![Event::RecordFailed("full".to_owned())], "that it runs could not be recorded"),
        (
            10,
            vec![Event::RunFailed("no".to_owned())],
            "it could not be started, the source is asked whether it lives",
        ),
        (
            10,
            vec![Event::RunFailed("no".to_owned()), Event::Message(Message::Pong(0))],
            "it is being given back",
        ),
    ]
}

fn events() -> Vec<(String, Event)> {
    let text = || "no".to_owned();
    let mut events: Vec<(String, Event)> = [
        ("Hello", greeting(hello())),
        ("Hello(version 9)", greeting(Hello { version_oldest: 9, version_newest: 9, ..hello() })),
        ("Hello(no lz4)", greeting(Hello { features: Features::NONE, ..hello() })),
        ("Hello(unverified)", greeting(Hello { features: Features::OURS, ..hello() })),
        ("Hello(another name)", greeting(Hello { name: "other".parse().unwrap(), ..hello() })),
        ("Hello(resumes)", greeting(Hello { resumes: true, ..hello() })),
        ("Describe", describe(regions())),
        ("Describe(no region)", describe(Vec::new())),
        ("Stopping", Event::Message(Message::Stopping(at(1)))),
        ("State", state(true)),
        ("State(paused by its operator)", state(false)),
        ("Prepare(2, no fence)", prepare(2, 0, MemoryDigest::ZERO)),
        ("Prepare(2)", prepare(2, 1, MemoryDigest::ZERO)),
        ("Prepare(2, other digest)", prepare(2, 1, digest())),
        ("Prepare(9)", prepare(9, 1, MemoryDigest::ZERO)),
        ("Commit(2)", commit(2)),
        ("Commit(9)", commit(9)),
        ("Released(2)", Event::Message(Message::Released(at(2)))),
        ("Released(9)", Event::Message(Message::Released(at(9)))),
        ("Abort", Event::Message(Message::Abort(Abort::new(AbortCode::Cancelled, "no")))),
        ("Ping", Event::Message(Message::Ping(1))),
        ("Rehearse", Event::Message(Message::Rehearse(Rehearse))),
        ("Disconnected", Event::Disconnected(text())),
        ("Reconnected", Event::Reconnected),
        ("MachineBuilt", Event::MachineBuilt),
        ("BuildFailed", Event::BuildFailed { code: AbortCode::NoMemory, sentence: text() }),
        ("FenceReached(1)", fence(1)),
        ("FenceReached(9)", fence(9)),
        ("StreamFailed", Event::StreamFailed { code: AbortCode::Protocol, sentence: text() }),
        ("StateRestored", Event::StateRestored { took: MS }),
        ("RestoreFailed", Event::RestoreFailed(text())),
        ("RecordWritten", Event::RecordWritten { took: MS }),
        ("RecordRehearsed", Event::RecordRehearsed { took: MS }),
        ("RehearsalFailed", Event::RehearsalFailed("full".to_owned())),
        ("RecordFailed", Event::RecordFailed(text())),
        ("VmRunning", Event::VmRunning { took: MS }),
        ("RunBroke", Event::RunBroke(text())),
        ("RunFailed", Event::RunFailed(text())),
        ("Cancel", Event::Cancel),
        ("Timeout", Event::Timeout),
        ("WitnessProbed", Event::WitnessProbed { took: MS }),
        ("WitnessSays(Target)", Event::WitnessSays(Ruling::Target)),
        ("WitnessSays(Source)", Event::WitnessSays(Ruling::Source)),
        ("WitnessSilent", Event::WitnessSilent(text())),
        ("Pong(0)", Event::Message(Message::Pong(0))),
        ("Hello(witness)", greeting(hello_with_witness())),
        ("StreamFailed(only the connection)", broken_stream()),
        ("StreamsEnded", ended()),
        ("KeepFor", keep_for()),
        ("Resume(1)", resumed(1)),
        ("Resume(0)", resumed(0)),
    ]
    .map(|(name, event)| (name.to_owned(), event))
    .into();
    events.extend(super::other_messages_to_target());
    events
}

/// The messages that only a target sends.
pub(super) fn messages_of_a_target() -> Vec<(&'static str, Message)> {
    let epoch = Epoch::new(2);
    let digest = MemoryDigest::ZERO;
    vec![
        ("Welcome", Message::Welcome(Welcome { version: 1, features: Features::OURS, host: "b".to_owned() })),
        ("Ready", Message::Ready(Ready { record_us: 1 })),
        ("FenceReached", Message::FenceReached(FenceReached { fence: 1 })),
        ("Prepared", Message::Prepared(Prepared { epoch, digest, wait_us: 0, restore_us: 0 })),
        ("Running", Message::Running(Running { epoch, record_us: 1, run_us: 2 })),
        ("Discarded(2)", Message::Discarded(at(2))),
        ("Discarded(9)", Message::Discarded(at(9))),
        ("Pong", Message::Pong(1)),
        ("Rehearsed", Message::Rehearsed(Rehearsed { record_us: 1 })),
        (
            "Arrived",
            Message::Arrived(Arrived { reached: 0, runs: vec![Run { first: 0, count: 1 }], next: None }),
        ),
        ("Admit", Message::Admit(Admit { session: 0, key: JoinSecret([1; 32]).key(0) })),
    ]
}

/// A record that names `migration` wherever its standing can.
fn record(vm: VmId, epoch: u64, standing: Standing, migration: MigrationId) -> Record {
    let coming = matches!(standing, Standing::Receiving { .. } | Standing::Discarded);
    let (coming, arrived) = if coming { (Some(migration), None) } else { (None, Some(migration)) };
    let own = Record::of_own(vm, "web".parse().unwrap(), Epoch::new(epoch), standing);
    Record { migration: coming, arrived_by: arrived, ..own }
}

fn along(steps: usize, then: &[Event], record: Option<Record>) -> Stepped {
    let events = way().into_iter().take(steps).map(|(_, event)| event).chain(then.iter().cloned());
    stepped(false, events, record)
}

fn stepped(
    carries_descriptors: bool,
    events: impl Iterator<Item = Event>,
    record: Option<Record>,
) -> Stepped {
    stepped_with(None, carries_descriptors, events, record)
}

fn stepped_with(
    witness: Option<WitnessId>,
    carries_descriptors: bool,
    events: impl Iterator<Item = Event>,
    record: Option<Record>,
) -> Stepped {
    let name = Some("web".parse().unwrap());
    let config =
        Config { host: "b".to_owned(), source: "a:1".to_owned(), carries_descriptors, name, record, witness };
    let mut target = Stepped { core: Target::new(config, Timestamp::default()), now: Timestamp::default() };
    for event in events {
        target.take(event);
    }
    target
}

pub(super) fn table() -> String {
    let mut text = String::new();
    for (steps, (name, _)) in way().into_iter().enumerate() {
        text += &part(name, || along(steps, &[], None), &events());
    }
    for (steps, then, name) in side_ways() {
        text += &part(name, || along(steps, &then, None), &events());
    }
    for (steps, (name, _)) in
        witnessed_way().into_iter().enumerate().filter(|(_, (name, _))| !name.is_empty())
    {
        text += &part(&format!("with a witness: {name}"), || witnessed(steps), &events());
    }
    let timeout = [("Timeout".to_owned(), Event::Timeout)];
    let pinging = |ticks: usize| {
        let mut events: Vec<Event> = way().into_iter().take(4).map(|(_, event)| event).collect();
        events[0] = greeting(Hello { features: Features::OURS.without(Features::UNVERIFIED), ..hello() });
        events.push(keep_for());
        events.extend(std::iter::repeat_n(Event::Timeout, ticks));
        stepped(false, events.into_iter(), None)
    };
    text += &part("a source that pings", || pinging(0), &timeout);
    text += &part("a source that has not pinged for five ticks", || pinging(5), &timeout);
    text
}

/// The target of a migration within one host.
pub(super) fn table_of_local() -> String {
    let mut text = String::new();
    let along = |steps| stepped(true, local_way().into_iter().take(steps).map(|(_, event)| event), None);
    for (steps, (name, _)) in local_way().into_iter().enumerate() {
        text += &part(name, || along(steps), &events());
    }
    text
}

/// What a target that has a record of the VM says to its source, which runs epoch 1.
pub(super) fn table_of_records() -> String {
    let greetings = [
        ("Hello".to_owned(), greeting(hello())),
        ("Hello(resumes)".to_owned(), greeting(Hello { resumes: true, ..hello() })),
    ];
    let peer = || "a:1".to_owned();
    let mut text = String::new();
    let (own, other) = (hello().migration, MigrationId([0xee; 16]));
    for (epoch, migration, which) in
        [(1, own, "this migration"), (2, own, "this migration"), (3, own, "this migration")]
            .into_iter()
            .chain([(2, other, "another migration")])
    {
        for standing in [
            Standing::Running,
            Standing::Committed { target: peer() },
            Standing::Released { target: peer() },
            Standing::Receiving { source: peer() },
            Standing::Discarded,
            Standing::Stopped,
        ] {
            let name = format!("the record says {} in epoch {epoch} by {which}", standing.word());
            let make = || along(0, &[], Some(record(VmId([1; 16]), epoch, standing.clone(), migration)));
            text += &part(&name, make, &greetings);
        }
    }
    let make = || along(0, &[], Some(record(VmId([9; 16]), 2, Standing::Running, own)));
    text += &part("the record says running in epoch 2, of another VM", make, &greetings);
    text
}
