//! Carries out what the source's core asks for, as the engine does.

use ferry_protocol::record::Standing;
use ferry_protocol::source::{Action, Config, Event, MemoryPath, OnTimeout, Outcome, Source};
use ferry_protocol::witness::Ruling;
use ferry_protocol::{MemoryLayout, Message, MigrationId, PageBitmap, Region, Timestamp};
use std::collections::VecDeque;
use std::time::Duration;

use ferry_protocol::message::{Abort, AbortCode, NetworkIdentity};
use ferry_protocol::page::Compression;

use crate::keyed::Keyed;
use crate::settings::{Mistake, Settings};
use crate::streams::{self, Senders};
use crate::world::{HostIndex, Link, Question, Sending, VM, WITNESS, World, vm_name};

/// How long a lost link is made again.
pub(crate) const RECONNECT: Duration = Duration::from_secs(30);

/// What writing a record takes: long enough not to be measured again in every round, of which there would be no end.
pub(crate) const RECORD_TOOK: Duration = Duration::from_millis(10);

/// Begins to migrate the guest of `host` to the other one.
pub(crate) fn begin(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(guest) = world.guest(host).cloned() else { return };
    world.attempts_left -= 1;
    let migration = MigrationId([10 + world.attempts_left; 16]);
    let (memory, reconnect) = if settings.streams {
        (MemoryPath::Streams, RECONNECT)
    } else {
        (MemoryPath::HandedOver, Duration::ZERO)
    };
    let config = Config {
        migration,
        vm: VM,
        name: vm_name(),
        epoch: guest.epoch,
        arrived_by: guest.arrived_by,
        target: "peer".to_owned(),
        witness: settings.witness.then_some(WITNESS),
        description: Vec::new(),
        memory,
        streams: 1,
        compression: Compression::None,
        verify: true,
        verify_whole: false,
        downtime_budget: Duration::from_secs(1),
        timeout: Duration::from_secs(300),
        on_timeout: OnTimeout::Cancel,
        reconnect,
    };
    let layout = MemoryLayout::new(vec![Region { gpa: 0, bytes: 4096 }]).expect("a page of memory");
    let core = Keyed::new(Source::new(config, layout, Timestamp::default()));
    let sending = Sending {
        core,
        migration,
        senders: Senders::default(),
        jobs: VecDeque::new(),
        inbox: VecDeque::new(),
        link: None,
        connecting: false,
        asked: None,
        answer: None,
        outcome: None,
    };
    if let Some(process) = world.process_mut(host) {
        process.sending = Some(sending);
    }
    work(world, host, settings);
}

/// Hands `event` to the core at `now` and does what it asks for.
pub(crate) fn handle(world: &mut World, host: HostIndex, now: Timestamp, event: Event, settings: &Settings) {
    if let Some(sending) = world.sending_mut(host) {
        sending.core.update(|core| core.handle(now, event));
        work(world, host, settings);
    }
}

fn work(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(sending) = world.sending_mut(host) else { return };
    let actions: Vec<Action> =
        sending.core.update(|core| std::iter::from_fn(|| core.poll_action()).collect());
    for action in actions {
        perform(world, host, action, settings);
    }
}

fn perform(world: &mut World, host: HostIndex, action: Action, settings: &Settings) {
    let Some(sending) = world.sending_mut(host) else { return };
    match action {
        Action::Connect { .. } => {
            let old = sending.link.take();
            sending.connecting = true;
            if let Some(link) = old.and_then(|old| world.link_mut(old)) {
                link.at_source = false;
            }
        }
        Action::Send(message) | Action::SendMemory(message) => {
            let number = sending.link;
            world.blamed |= blames(&message);
            if let Some(link) = number.and_then(|number| world.link_mut(number))
                && link.at_target
                && !link.cut
            {
                link.to_target.push_back(Keyed::new(message));
            }
        }
        Action::WriteRecord(record)
            if settings.mistake == Some(Mistake::CommitBeforeFsync)
                && matches!(record.standing, Standing::Committed { .. }) =>
        {
            sending.jobs.push_back(Keyed::new(Action::WriteRecord(record)));
            handle(world, host, Timestamp::default(), written(), settings);
        }
        Action::StartDirtyLog
        | Action::ReadDirtyLog
        | Action::StopDirtyLog
        | Action::PauseVm
        | Action::SaveState
        | Action::ResumeVm
        | Action::ReleaseVm
        | Action::WriteRecord(_)
        | Action::RehearseRecord(_) => sending.jobs.push_back(Keyed::new(action)),
        Action::OpenStreams { .. } => streams::open(world, host, 0, None, settings),
        Action::ReopenStreams { session, lacking, .. } => {
            streams::open(world, host, session, Some(lacking), settings);
        }
        Action::SendPages { pages, fence, .. } => streams::send(world, host, &pages, fence),
        Action::CloseStreams => streams::close(world, host),
        Action::AskWitness(claim) => sending.asked = Some(Question::Claim(claim)),
        Action::Report(_) => {}
        Action::Finish(outcome) => sending.outcome = Some(Keyed::new(outcome)),
    }
}

const fn written() -> Event {
    Event::RecordWritten { took: RECORD_TOOK }
}

/// Whether a message says that the other side, or the memory that came, is not what it must be: no fault may lead to that.
pub(crate) const fn blames(message: &Message) -> bool {
    let Message::Abort(Abort { code, .. }) = message else { return false };
    matches!(code, AbortCode::Protocol | AbortCode::DigestDiffers)
}

/// All jobs are done: the engine closes its connection, and the process draws the consequences.
pub(crate) fn close(world: &mut World, host: HostIndex) {
    let Some(process) = world.process_mut(host) else { return };
    let Some(Sending { link, outcome, .. }) = process.sending.take() else { return };
    match outcome.as_deref() {
        None => {}
        // The process has nothing more to host.
        Some(Outcome::Moved(_) | Outcome::LetGo { .. }) => return world.end_process(host),
        Some(Outcome::Stayed { epoch, .. }) => {
            if let Some(guest) = &mut process.guest {
                guest.epoch = *epoch;
            }
        }
    }
    if let Some(link) = link.and_then(|link| world.link_mut(link)) {
        link.at_source = false;
    }
}

/// Does the first job in the queue.
pub(crate) fn do_job(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(process) = world.process_mut(host) else { return };
    let Some(sending) = &mut process.sending else { return };
    let Some(job) = sending.jobs.pop_front() else { return };
    let (mut record_durable, mut newest) = (None, None);
    let at_once = settings.streams && sending.inbox.is_empty() && changes_nothing(&job);
    let event = match &*job {
        Action::PauseVm => {
            process.guest.iter_mut().for_each(|guest| guest.runs = false);
            Some(Event::Paused)
        }
        Action::SaveState => Some(Event::StateSaved {
            state: process.guest.iter().map(|guest| guest.state).collect(),
            network: NetworkIdentity::default(),
            runs: true,
            took: Duration::ZERO,
        }),
        Action::ResumeVm => {
            if let Some(guest) = &mut process.guest {
                // It has run on, so that what was saved of it before is of the past.
                let stood_still = !std::mem::replace(&mut guest.runs, true);
                guest.state += u8::from(stood_still && settings.streams);
                newest = Some(guest.state);
            }
            Some(Event::VmResumed)
        }
        Action::ReleaseVm => {
            process.guest = None;
            None
        }
        Action::WriteRecord(record) => {
            record_durable = Some(record.clone());
            Some(written())
        }
        Action::RehearseRecord(_) => Some(Event::RecordRehearsed { took: RECORD_TOOK }),
        Action::StartDirtyLog => {
            process.guest.iter_mut().for_each(|guest| guest.log = Some(false));
            Some(Event::DirtyLogStarted)
        }
        Action::ReadDirtyLog => {
            let dirty = process.guest.as_mut().and_then(|guest| guest.log.replace(false));
            let pages = if dirty == Some(true) { PageBitmap::full(1) } else { PageBitmap::empty(1) };
            Some(Event::DirtyLogRead { pages, took: Duration::ZERO })
        }
        Action::StopDirtyLog => {
            process.guest.iter_mut().for_each(|guest| guest.log = None);
            None
        }
        Action::Connect { .. }
        | Action::Send(_)
        | Action::SendMemory(_)
        | Action::OpenStreams { .. }
        | Action::ReopenStreams { .. }
        | Action::CloseStreams
        | Action::SendPages { .. }
        | Action::AskWitness(_)
        | Action::Report(_)
        | Action::Finish(_) => None,
    };
    world.state = newest.unwrap_or(world.state);
    if let Some(event) = event.clone().filter(|_| at_once) {
        return handle(world, host, Timestamp::default(), event, settings);
    }
    if let Some(sending) = world.sending_mut(host) {
        sending.inbox.extend(event.map(Keyed::new));
    }
    if let Some(record) = record_durable {
        world.host_mut(host).disk = Some(Keyed::new(record));
    }
}

/// Whether it makes no difference to anybody else if this is done and the core has not heard of it.
pub(crate) const fn changes_nothing(job: &Action) -> bool {
    matches!(
        job,
        Action::RehearseRecord(_)
            | Action::StartDirtyLog
            | Action::StopDirtyLog
            | Action::SaveState
            | Action::PauseVm
    )
}

/// The first job, writing a record, fails; the record may be on disk all the same.
pub(crate) fn fail_job(world: &mut World, host: HostIndex, on_disk: bool) {
    let Some(sending) = world.sending_mut(host) else { return };
    let Some(job) = sending.jobs.pop_front() else { return };
    sending.inbox.push_back(Keyed::new(Event::RecordFailed("the disk is full".to_owned())));
    if let (Action::WriteRecord(record), true) = (&*job, on_disk) {
        world.host_mut(host).disk = Some(Keyed::new(record.clone()));
    }
}

/// The core hears of what was done.
pub(crate) fn hears(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(sending) = world.sending_mut(host) else { return };
    let Some(event) = sending.inbox.pop_front() else { return };
    let mut event = (*event).clone();
    if let Event::DirtyLogRead { pages, .. } = &mut event
        && settings.mistake == Some(Mistake::ForgetTheLog)
        && sending.core.phase() == "reconnecting"
    {
        *pages = PageBitmap::empty(1);
    }
    handle(world, host, Timestamp::default(), event, settings);
}

/// An attempt to connect ends.
pub(crate) fn connected(world: &mut World, host: HostIndex, settings: &Settings) {
    let listens = world.process(1 - host).is_some_and(|process| process.listens);
    if !listens {
        return not_connected(world, host, settings);
    }
    let number = (0..).find(|&number| world.link(number).is_none()).expect("links are few");
    world.links.push(Link {
        number,
        from: host,
        to_target: VecDeque::new(),
        to_source: VecDeque::new(),
        at_source: true,
        at_target: true,
        greeted: false,
        cut: false,
    });
    if let Some(sending) = world.sending_mut(host) {
        sending.link = Some(number);
        sending.connecting = false;
    }
    handle(world, host, Timestamp::default(), Event::Connected, settings);
}

pub(crate) fn not_connected(world: &mut World, host: HostIndex, settings: &Settings) {
    if let Some(sending) = world.sending_mut(host) {
        sending.connecting = false;
    }
    let event = Event::Disconnected("nobody answers".to_owned());
    handle(world, host, Timestamp::default(), event, settings);
}

/// The witness hears the source's question, or does not; the answer may be lost.
pub(crate) fn ask(world: &mut World, host: HostIndex, answered: bool, settings: &Settings) {
    let Some(question) = world.sending_mut(host).and_then(|sending| sending.asked.take()) else { return };
    let ruling = if world.witness.reached_by[host] { world.witness.hear(question) } else { None };
    let silent = || match settings.mistake {
        Some(Mistake::TakeBackWithoutWitness) => Event::WitnessSays(Ruling::Source),
        _ => Event::WitnessSilent("it can't be reached".to_owned()),
    };
    let answer = ruling.filter(|_| answered).map_or_else(silent, Event::WitnessSays);
    if let Some(sending) = world.sending_mut(host) {
        sending.answer = Some(Keyed::new(answer));
    }
}

/// The target does not answer the source that has reached it again, which tries once more.
pub(crate) fn tries_again(world: &mut World, host: HostIndex, settings: &Settings) {
    if let Some(at) = world.sending(host).and_then(|sending| sending.core.poll_timeout()) {
        handle(world, host, at, Event::Timeout, settings);
    }
}

/// The core's time has come.
pub(crate) fn timeout(world: &mut World, host: HostIndex, settings: &Settings) {
    let Some(sending) = world.sending(host) else { return };
    let Some(at) = sending.core.poll_timeout() else { return };
    let committed = sending.core.phase() == "committed";
    let reconnecting = sending.core.phase() == "reconnecting";
    let at = if reconnecting { Timestamp::from_origin(RECONNECT) } else { at };
    handle(world, host, at, Event::Timeout, settings);
    if committed
        && settings.mistake == Some(Mistake::ResumeOnTimeout)
        && let Some(guest) = world.process_mut(host).and_then(|process| process.guest.as_mut())
    {
        guest.runs = true;
    }
}
