//! Carries out what the target's core asks for, and sorts what knocks, as the engine does.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_protocol::admission::{JoinSecret, PROOF_BYTES};
use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::negotiation::Features;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::target::{Action, Config, Event, Outcome, Target};
use ferry_protocol::witness::Ruling;
use ferry_protocol::{Message, Timestamp};

use crate::keyed::Keyed;
use crate::settings::{Mistake, Settings};
use crate::source_side::{RECORD_TOOK, blames};
use crate::streams::{self, Received};
use crate::world::{Guest, HostIndex, Question, Receiving, WITNESS, World};

/// Takes the next message of connection `number` to `host`.
pub(crate) fn deliver(world: &mut World, host: HostIndex, number: u8, settings: &Settings) {
    let Some(link) = world.link_mut(number) else { return };
    let Some(message) = link.to_target.pop_front() else { return };
    if link.greeted {
        let event = Event::Message((*message).clone());
        return handle(world, host, Timestamp::default(), event, settings);
    }
    link.greeted = true;
    if let Message::Hello(hello) = &*message {
        // Pings would count time, which is not modelled; that a side takes the other for silent is the same as a connection
        // that breaks, or a timeout.
        let features = hello.features.without(Features::KEEPALIVE);
        knock(world, host, &Hello { features, ..hello.clone() }, number, settings);
    }
}

fn knock(world: &mut World, host: HostIndex, hello: &Hello, number: u8, settings: &Settings) {
    let Some(receiving) = world.receiving_mut(host) else {
        return begin(world, host, hello.clone(), number, settings);
    };
    if receiving.core.resumed_by(hello) {
        let old = receiving.link.replace(number);
        if let Some(link) = old.and_then(|old| world.link_mut(old)) {
            link.at_target = false;
        }
        return handle(world, host, Timestamp::default(), Event::Reconnected, settings);
    }
    let free = receiving.newer.is_none();
    if free && (receiving.core.is_ending() || receiving.core.superseded_by(hello)) {
        receiving.newer = Some(number);
        // It is read again when its turn comes.
        if let Some(link) = world.link_mut(number) {
            link.to_target.push_front(Keyed::new(Message::Hello(hello.clone())));
        }
        return handle(world, host, Timestamp::default(), Event::Cancel, settings);
    }
    if let Some(link) = world.link_mut(number) {
        let busy = Message::Abort(Abort::new(AbortCode::Occupied, "busy"));
        link.to_source.push_back(Keyed::new(busy));
        link.at_target = false;
    }
}

fn begin(world: &mut World, host: HostIndex, hello: Hello, number: u8, settings: &Settings) {
    let record = world.hosts[host].disk.as_deref().cloned();
    let config = Config {
        host: "b".to_owned(),
        source: "peer".to_owned(),
        carries_descriptors: !settings.streams,
        name: None,
        record,
        witness: settings.witness.then_some(WITNESS),
    };
    let core = Target::new(config, Timestamp::default()).with_admission(JoinSecret([7; PROOF_BYTES]));
    let core = Keyed::new(core);
    let migration = hello.migration;
    let receiving = Receiving {
        core,
        migration,
        jobs: VecDeque::new(),
        inbox: VecDeque::new(),
        link: Some(number),
        newer: None,
        machine: false,
        streams: Received::default(),
        asked: None,
        answer: None,
        outcome: None,
    };
    if let Some(process) = world.process_mut(host) {
        process.receiving = Some(receiving);
    }
    handle(world, host, Timestamp::default(), Event::Message(Message::Hello(hello)), settings);
}

/// Hands `event` to the core at `now` and does what it asks for.
pub(crate) fn handle(world: &mut World, host: HostIndex, now: Timestamp, event: Event, settings: &Settings) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    let actions: Vec<Action> = receiving.core.update(|core| {
        core.handle(now, event);
        std::iter::from_fn(|| core.poll_action()).collect()
    });
    for action in actions {
        perform(world, host, action, settings);
    }
}

fn perform(world: &mut World, host: HostIndex, action: Action, settings: &Settings) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    match action {
        Action::Send(message) => {
            let number = receiving.link;
            world.blamed |= blames(&message);
            if let Some(link) = number.and_then(|number| world.link_mut(number))
                && link.at_source
                && !link.cut
            {
                link.to_source.push_back(Keyed::new(message));
            }
        }
        Action::WriteRecord(record) => write(world, host, record, settings),
        Action::RehearseRecord(_)
        | Action::BuildMachine { .. }
        | Action::AdoptMemory { .. }
        | Action::RestoreState(_)
        | Action::RunVm { .. } => receiving.jobs.push_back(Keyed::new(action)),
        Action::DiscardMachine => {
            receiving.jobs.push_back(Keyed::new(action));
            streams::drop_all(world, host);
        }
        Action::EndStreams => {
            receiving.jobs.push_back(Keyed::new(action));
            streams::end(&mut receiving.streams);
        }
        Action::ExpectStreams { session, digest } => streams::expect(&mut receiving.streams, session, digest),
        Action::HangUp => {
            let number = receiving.link.take();
            if let Some(link) = number.and_then(|number| world.link_mut(number)) {
                link.at_target = false;
            }
        }
        Action::ProbeWitness => receiving.asked = Some(Question::Probe),
        Action::AskWitness(claim) => receiving.asked = Some(Question::Claim(claim)),
        Action::DropStaleFrames | Action::Announce(_) | Action::Report(_) => {}
        Action::Finish(outcome) => receiving.outcome = Some(Keyed::new(outcome)),
    }
}

fn write(world: &mut World, host: HostIndex, record: Record, settings: &Settings) {
    let early = match (settings.mistake, &record.standing) {
        (Some(Mistake::RunBeforeRecord), Standing::Running) => {
            start(world, host, &record);
            false
        }
        (Some(Mistake::DiscardedBeforeFsync), Standing::Discarded) => true,
        _ => false,
    };
    let Some(receiving) = world.receiving_mut(host) else { return };
    receiving.jobs.push_back(Keyed::new(Action::WriteRecord(record)));
    if early {
        handle(world, host, Timestamp::default(), written(), settings);
    }
}

const fn written() -> Event {
    Event::RecordWritten { took: RECORD_TOOK }
}

/// The guest begins to run here.
fn start(world: &mut World, host: HostIndex, record: &Record) {
    world.life += 1;
    let life = world.life;
    if let Some(process) = world.process_mut(host) {
        let (epoch, arrived_by) = (record.epoch, record.arrived_by);
        let streams = process.receiving.as_ref().map(|receiving| &receiving.streams);
        let (memory, state) = streams.map_or((0, 0), |streams| (streams.memory, streams.state));
        process.guest = Some(Guest { epoch, arrived_by, runs: true, life, memory, state, log: None });
    }
}

/// All jobs are done: the engine closes the connection, and listens on unless the guest is here.
pub(crate) fn close(world: &mut World, host: HostIndex) {
    let Some(process) = world.process_mut(host) else { return };
    let Some(receiving) = process.receiving.take() else { return };
    match receiving.outcome.as_deref() {
        Some(Outcome::Running { .. }) => process.listens = false,
        Some(Outcome::Discarded { .. }) | None => {}
    }
    streams::drop_all(world, host);
    if let Some(link) = receiving.link.and_then(|link| world.link_mut(link)) {
        link.at_target = false;
    }
    if let Some(link) = receiving.newer.and_then(|link| world.link_mut(link)) {
        // Its `Hello` was put back.
        link.greeted = false;
    }
    if let Some(process) = world.process_mut(host)
        && (!process.listens || process.stopping)
    {
        process.listens = false;
        for link in world.links.iter_mut().filter(|link| link.from != host) {
            link.at_target = false;
        }
    }
}

/// Does the first job in the queue.
pub(crate) fn do_job(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    let Some(job) = receiving.jobs.pop_front() else { return };
    // It makes no difference to anybody else if these are done and the core has not heard of it.
    let alone = matches!(*job, Action::BuildMachine { .. } | Action::RestoreState(_) | Action::EndStreams);
    let at_once = settings.streams && receiving.inbox.is_empty() && alone;
    let event = match &*job {
        Action::BuildMachine { .. } | Action::AdoptMemory { .. } => {
            receiving.machine = true;
            Some(Event::MachineBuilt)
        }
        Action::RestoreState(state) => {
            let kept = settings.mistake == Some(Mistake::KeepTheFirstState) && receiving.streams.state > 0;
            if !kept {
                receiving.streams.state = state.first().copied().unwrap_or_default();
            }
            Some(Event::StateRestored { took: Duration::ZERO })
        }
        Action::EndStreams => streams::ended(world, host),
        Action::RehearseRecord(_) => Some(Event::RecordRehearsed { took: RECORD_TOOK }),
        Action::WriteRecord(record) => {
            receiving.inbox.push_back(Keyed::new(written()));
            return world.host_mut(host).disk = Some(Keyed::new(record.clone()));
        }
        Action::RunVm { .. } => return run(world, host),
        Action::DiscardMachine => {
            receiving.machine = false;
            // A guest that was started against the rules ends with its machine.
            return world.process_mut(host).into_iter().for_each(|process| process.guest = None);
        }
        Action::Send(_)
        | Action::ExpectStreams { .. }
        | Action::HangUp
        | Action::ProbeWitness
        | Action::AskWitness(_)
        | Action::DropStaleFrames
        | Action::Announce(_)
        | Action::Report(_)
        | Action::Finish(_) => None,
    };
    if let Some(receiving) = world.receiving_mut(host) {
        receiving.inbox.extend(event.map(Keyed::new));
    }
    while at_once && world.receiving(host).is_some_and(|receiving| !receiving.inbox.is_empty()) {
        hears(world, host, settings);
    }
}

/// The core hears of what was done.
pub(crate) fn hears(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    let Some(event) = receiving.inbox.pop_front() else { return };
    if *event == Event::MachineBuilt && receiving.core.is_ending() {
        receiving.machine = false;
        return;
    }
    handle(world, host, Timestamp::default(), (*event).clone(), settings);
}

/// As `ferry receive` does: only what the record on disk allows is started.
fn run(world: &mut World, host: HostIndex) {
    let record = world.hosts[host].disk.as_deref().cloned();
    let event = match record.filter(|record| record.standing == Standing::Running) {
        Some(record) => {
            if world.guest(host).is_none() {
                start(world, host, &record);
            }
            Event::VmRunning { took: Duration::ZERO }
        }
        None => Event::RunFailed("the record is missing".to_owned()),
    };
    if let Some(receiving) = world.receiving_mut(host) {
        receiving.inbox.push_back(Keyed::new(event));
    }
}

/// The first job fails: a record, which may be on disk all the same, or the guest's start.
pub(crate) fn fail_job(world: &mut World, host: HostIndex, on_disk: bool) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    let Some(job) = receiving.jobs.pop_front() else { return };
    let failed = "it failed".to_owned();
    let event = if matches!(*job, Action::WriteRecord(_)) {
        Event::RecordFailed(failed)
    } else if matches!(*job, Action::RunVm { .. }) {
        Event::RunFailed(failed)
    } else {
        Event::RestoreFailed(failed)
    };
    receiving.inbox.push_back(Keyed::new(event));
    if let (Action::WriteRecord(record), true) = (&*job, on_disk) {
        world.host_mut(host).disk = Some(Keyed::new(record.clone()));
    }
}

/// The witness hears the target's question, or does not; the answer may be lost.
pub(crate) fn ask(world: &mut World, host: HostIndex, answered: bool, settings: &Settings) {
    let Some(question) = world.receiving_mut(host).and_then(|receiving| receiving.asked.take()) else {
        return;
    };
    let reached = world.witness.reached_by[host];
    let ruling = if reached { world.witness.hear(question) } else { None };
    let silent = match (settings.mistake, question) {
        (Some(Mistake::RunWithoutWitness), Question::Claim(_)) => Event::WitnessSays(Ruling::Target),
        _ => Event::WitnessSilent("it can't be reached".to_owned()),
    };
    let answer = match (question, ruling) {
        (Question::Probe, _) if reached && answered => Event::WitnessProbed { took: Duration::ZERO },
        (Question::Claim(_), Some(ruling)) if answered => Event::WitnessSays(ruling),
        (Question::Probe | Question::Claim(_), _) => silent,
    };
    if let Some(receiving) = world.receiving_mut(host) {
        receiving.answer = Some(Keyed::new(answer));
    }
}

/// The core's time has come.
pub(crate) fn timeout(world: &mut World, host: HostIndex, settings: &Settings) {
    let at = world.receiving(host).and_then(|receiving| receiving.core.poll_timeout());
    if let Some(at) = at {
        handle(world, host, at, Event::Timeout, settings);
    }
}
