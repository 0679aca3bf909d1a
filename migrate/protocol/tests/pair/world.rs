//! A source and a target core in one virtual world: a control link, records that last, a guest on each side of
//! which nothing but "runs or not" is real, and a clock that jumps from one event to the next.
//!
//! Pages are not real here (the seeded simulation in the workspace's `tests/` moves real ones): a round is a
//! number of pages, and its digest a number that both sides are told.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ferry_protocol::admission::JoinSecret;
use ferry_protocol::message::{AbortCode, Hello, MessageType};
use ferry_protocol::negotiation::Features;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::source::{self, Source};
use ferry_protocol::target::{self, Target};
use ferry_protocol::wire;
use ferry_protocol::{
    Epoch, MemoryDigest, MemoryLayout, Message, MigrationId, PAGE_BYTES, PageBitmap, PageDigest, Region,
    StreamIndex, Timestamp, VmId,
};

use crate::disk::Disk;

/// What the target makes keys for data streams of.
const SECRET: JoinSecret = JoinSecret([9; 32]);

pub(crate) const MS: Duration = Duration::from_millis(1);
pub(crate) const PAGES: u64 = 4096;
pub(crate) const STREAMS: u16 = 2;

/// How long a message takes to the other side.
const LATENCY: Duration = Duration::from_micros(500);
pub(crate) const VM_WORK: Duration = Duration::from_micros(300);
const PAGE_WORK: Duration = Duration::from_micros(10);

/// More steps than this mean that the two go round in circles.
const STEPS_MAX: usize = 20_000;

/// What comes due at some time.
#[derive(Debug, Clone)]
pub(crate) enum Due {
    Source(source::Event),
    Target(target::Event),
    /// The source's connection attempt ends.
    Connect,
    ToSource(u32, Message),
    ToTarget(u32, Message),
    LostAtSource(u32),
    LostAtTarget(u32),
    /// One side has closed the connection behind its last message.
    Closed(u32),
}

/// A host's guest as far as this world knows it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) runs: bool,
    pub(crate) exists: bool,
    pub(crate) dirty_log: bool,
}

/// The world.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) now: Timestamp,
    pub(crate) source: Source,
    pub(crate) target: Option<Target>,
    pub(crate) source_disk: Disk,
    pub(crate) target_disk: Disk,
    pub(crate) source_guest: Guest,
    pub(crate) target_guest: Guest,
    pub(crate) source_outcome: Option<source::Outcome>,
    pub(crate) target_outcomes: Vec<target::Outcome>,
    pub(crate) source_progress: Vec<source::Progress>,
    pub(crate) target_progress: Vec<target::Progress>,
    /// What each request to connect asked to wait for.
    pub(crate) connect_delays: Vec<Duration>,
    /// Every message that was handed over, in order: true for those to the target.
    pub(crate) delivered: Vec<(bool, MessageType)>,
    /// Pages that each following dirty log names; the last one stays.
    pub(crate) dirty_pages: Vec<u64>,
    /// The target's memory differs from the source's.
    pub(crate) memory_differs: bool,
    /// The target knows nothing of migrations without digests, as older ones.
    pub(crate) target_always_verifies: bool,
    /// The target can't build its machine.
    pub(crate) build_refusal: Option<(AbortCode, &'static str)>,
    /// The connection can carry descriptors, as far as the target knows.
    pub(crate) target_carries_descriptors: bool,
    /// The target has the source's own memory, and its guest has never run.
    pub(crate) adopted: bool,
    /// The only VM that the target's operator wants.
    pub(crate) target_name: Option<String>,
    /// How long the coming answers to `Ping` take besides, one after another.
    pub(crate) slow_pongs: VecDeque<Duration>,
    /// How many times longer a bandwidth cap makes every round but the last.
    pub(crate) slowed_by_cap: u32,
    /// Nothing can connect before.
    outage_until: Option<Timestamp>,
    /// The first message of this type is not delivered, and the connection breaks instead.
    pub(crate) cut_at: Option<MessageType>,
    connection: Option<u32>,
    connections: u32,
    pub(crate) queue: BTreeMap<(Timestamp, u64), Due>,
    sequence: u64,
    streams_open: bool,
    /// The pages of the round that was begun last.
    pub(crate) round: PageBitmap,
    /// No message arrives, though both connections stand.
    pub(crate) silent: bool,
    /// Every set of pages that was sent, in order.
    pub(crate) sent: Vec<PageBitmap>,
    /// How often the target was to restore the state.
    pub(crate) restores: u32,
    /// Every set of pages that was put back after the link broke.
    pub(crate) lacking: Vec<PageBitmap>,
    /// Whether the streams take digests, at the source and at the target.
    pub(crate) streams_verify: (bool, bool),
    /// A connection with another migration that waits for the target to be free.
    pub(crate) waiting: Option<Hello>,
}

pub(crate) fn config() -> source::Config {
    source::Config {
        migration: MigrationId([7; 16]),
        vm: VmId([1; 16]),
        name: "web".parse().unwrap(),
        epoch: Epoch::FIRST,
        arrived_by: None,
        target: "b:4444".to_owned(),
        witness: None,
        description: vec![1, 2, 3],
        memory: source::MemoryPath::Streams,
        streams: STREAMS,
        compression: ferry_protocol::page::Compression::None,
        verify: true,
        verify_whole: false,
        downtime_budget: 50 * MS,
        timeout: Duration::from_secs(60),
        on_timeout: source::OnTimeout::Cancel,
        reconnect: Duration::from_secs(30),
    }
}

pub(crate) fn layout() -> MemoryLayout {
    let low = Region { gpa: 0, bytes: PAGES / 2 * 4096 };
    let high = Region { gpa: 1 << 32, bytes: PAGES / 2 * 4096 };
    MemoryLayout::new(vec![low, high]).unwrap()
}

/// A digest that stands for memory contents number `number`, or for one stream's part of it.
pub(crate) fn digest(number: u64) -> MemoryDigest {
    PageDigest::of(number, &[1; PAGE_BYTES]).alone()
}

impl Pair {
    pub(crate) fn new(config: source::Config) -> Self {
        let now = Timestamp::default();
        let record = Record::of_own(config.vm, config.name.clone(), config.epoch, Standing::Running);
        let target_carries_descriptors = config.memory == source::MemoryPath::HandedOver;
        Self {
            now,
            source: Source::new(config, layout(), now),
            target: None,
            source_disk: Disk { record: Some(record), ..Disk::default() },
            target_disk: Disk::default(),
            source_guest: Guest { runs: true, exists: true, dirty_log: false },
            target_guest: Guest::default(),
            source_outcome: None,
            target_outcomes: Vec::new(),
            source_progress: Vec::new(),
            target_progress: Vec::new(),
            connect_delays: Vec::new(),
            delivered: Vec::new(),
            dirty_pages: vec![PAGES, 900, 100, 10],
            memory_differs: false,
            target_always_verifies: false,
            build_refusal: None,
            target_carries_descriptors,
            adopted: false,
            target_name: None,
            slow_pongs: VecDeque::new(),
            slowed_by_cap: 1,
            outage_until: None,
            cut_at: None,
            connection: None,
            connections: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            streams_open: false,
            round: PageBitmap::empty(PAGES),
            silent: false,
            sent: Vec::new(),
            restores: 0,
            lacking: Vec::new(),
            streams_verify: (false, false),
            waiting: None,
        }
    }

    /// Steps until `done`; false if nothing is left to happen before that.
    pub(crate) fn run_until(&mut self, mut done: impl FnMut(&Self) -> bool) -> bool {
        for _ in 0..STEPS_MAX {
            self.perform_all();
            if done(self) {
                return true;
            }
            if !self.step() {
                return false;
            }
        }
        panic!("the two go round in circles at {:?}: source {}", self.now, self.source.phase());
    }

    /// Steps until nothing is left to happen.
    pub(crate) fn run_to_end(&mut self) {
        self.run_until(|_| false);
    }

    /// Steps until the source is in `phase`.
    pub(crate) fn run_to_source_phase(&mut self, phase: &str) {
        assert!(self.run_until(|pair| pair.source.phase() == phase), "the source never got to {phase}");
    }

    /// Steps until the target is in `phase`.
    pub(crate) fn run_to_target_phase(&mut self, phase: &str) {
        let there = |pair: &Self| pair.target.as_ref().is_some_and(|target| target.phase() == phase);
        assert!(self.run_until(there), "the target never got to {phase}");
    }

    /// Hands an event to the source now.
    pub(crate) fn tell_source(&mut self, event: source::Event) {
        self.source.handle(self.now, event);
        self.perform_all();
    }

    /// Hands an event to the target now.
    pub(crate) fn tell_target(&mut self, event: target::Event) {
        self.target.as_mut().expect("a target").handle(self.now, event);
        self.perform_all();
    }

    /// Breaks the control connection; it can be made again after `outage`. What was under way on it is lost.
    pub(crate) fn cut_control(&mut self, outage: Duration) {
        self.outage_until = self.outage_until.max(Some(self.now + outage));
        if let Some(number) = self.connection.take() {
            self.after(Duration::ZERO, Due::LostAtSource(number));
            self.after(Duration::ZERO, Due::LostAtTarget(number));
        }
    }

    /// Breaks everything between the two.
    pub(crate) fn cut_all(&mut self, outage: Duration) {
        self.cut_control(outage);
        if self.streams_open {
            self.lose_streams();
        }
    }

    /// Breaks the data streams.
    pub(crate) fn lose_streams(&mut self) {
        self.end_streams();
        let reason = "connection reset".to_owned();
        let code = AbortCode::Internal;
        self.after(Duration::ZERO, Due::Source(source::Event::StreamFailed(reason.clone())));
        self.after(Duration::ZERO, Due::Target(target::Event::StreamFailed { code, sentence: reason }));
    }

    /// Nothing of what was under way on the streams comes any more.
    pub(crate) fn end_streams(&mut self) {
        self.streams_open = false;
        let of_a_stream = |due: &Due| {
            matches!(
                due,
                Due::Source(source::Event::RoundSent(_)) | Due::Target(target::Event::FenceReached { .. })
            )
        };
        self.queue.retain(|_, due| !of_a_stream(due));
    }

    /// The target's process is killed and started again; its disk stays.
    pub(crate) fn restart_target(&mut self) {
        self.target = None;
        self.target_guest = Guest::default();
        self.queue.retain(|_, due| !matches!(due, Due::Target(_)));
        self.cut_all(Duration::ZERO);
    }

    pub(crate) fn after(&mut self, delay: Duration, due: Due) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), due);
    }

    /// Whatever is next: a due event or a timeout.
    fn step(&mut self) -> bool {
        let due = self.queue.first_key_value().map(|((at, _), _)| *at);
        let source = self.source.poll_timeout();
        let target = self.target.as_ref().and_then(Target::poll_timeout);
        let Some(at) = [due, source, target].into_iter().flatten().min() else {
            return false;
        };
        self.now = self.now.max(at);
        if due == Some(at) {
            let (_, due) = self.queue.pop_first().expect("it was there");
            self.happen(due);
        } else if source == Some(at) {
            self.source.handle(self.now, source::Event::Timeout);
        } else if let Some(target) = &mut self.target {
            target.handle(self.now, target::Event::Timeout);
        }
        true
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Source(event) => self.source.handle(self.now, event),
            Due::Target(event) => {
                if let Some(target) = &mut self.target {
                    target.handle(self.now, event);
                }
            }
            Due::Connect => self.connect(),
            Due::ToSource(number, message) if self.connection == Some(number) => {
                self.delivered.push((false, message.message_type()));
                self.source.handle(self.now, source::Event::Message(message));
            }
            Due::ToTarget(number, message) if self.connection == Some(number) => {
                self.delivered.push((true, message.message_type()));
                self.message_to_target(message);
            }
            Due::ToSource(..) | Due::ToTarget(..) => {}
            Due::LostAtSource(number) if self.connection.is_none() && number == self.connections => {
                self.source.handle(self.now, source::Event::Disconnected("connection reset".to_owned()));
            }
            Due::LostAtTarget(number) if self.connection.is_none() && number == self.connections => {
                if let Some(target) = &mut self.target {
                    target.handle(self.now, target::Event::Disconnected("connection reset".to_owned()));
                }
            }
            Due::LostAtSource(_) | Due::LostAtTarget(_) => {}
            Due::Closed(number) if self.connection == Some(number) => self.cut_control(Duration::ZERO),
            Due::Closed(_) => {}
        }
    }

    fn connect(&mut self) {
        if self.outage_until.is_some_and(|until| self.now < until) {
            self.source.handle(self.now, source::Event::Disconnected("no route to host".to_owned()));
            return;
        }
        self.connections += 1;
        self.connection = Some(self.connections);
        self.source.handle(self.now, source::Event::Connected);
    }

    /// Sorts a message as the engine's listener does.
    fn message_to_target(&mut self, message: Message) {
        let Message::Hello(mut hello) = message else {
            if let Some(target) = &mut self.target {
                target.handle(self.now, target::Event::Message(message));
            }
            return;
        };
        if self.target_always_verifies {
            hello.features = hello.features.without(Features::UNVERIFIED);
        }
        match &mut self.target {
            None => self.begin_target(hello),
            Some(target) if target.resumed_by(&hello) => {
                target.handle(self.now, target::Event::Reconnected);
            }
            Some(target) if target.is_ending() || target.superseded_by(&hello) => {
                self.waiting = Some(hello);
                target.handle(self.now, target::Event::Cancel);
            }
            Some(_) => {
                let abort = ferry_protocol::message::Abort::new(AbortCode::Occupied, "busy");
                self.deliver_to_source(Message::Abort(abort));
            }
        }
    }

    fn begin_target(&mut self, hello: Hello) {
        let config = target::Config {
            host: "b".to_owned(),
            source: "a:1".to_owned(),
            carries_descriptors: self.target_carries_descriptors,
            name: self.target_name.as_ref().map(|name| name.parse().unwrap()),
            record: self.target_disk.record.clone(),
            witness: None,
        };
        let mut target = Target::new(config, self.now).with_admission(SECRET);
        target.handle(self.now, target::Event::Message(Message::Hello(hello)));
        self.target = Some(target);
    }

    fn perform_all(&mut self) {
        loop {
            if let Some(action) = self.source.poll_action() {
                self.perform_source(action);
            } else if let Some(action) = self.target.as_mut().and_then(Target::poll_action) {
                self.perform_target(action);
            } else if let (None, Some(hello)) = (&self.target, self.waiting.take()) {
                self.begin_target(hello);
            } else {
                break;
            }
            self.check();
        }
    }

    /// What must hold at every instant.
    fn check(&self) {
        assert!(!(self.source_guest.runs && self.target_guest.runs), "two hosts run the guest");
        assert!(!self.source_guest.runs || self.source.may_run(), "the source runs what it gave away");
    }

    fn reconnect(&mut self, delay: Duration) {
        self.connect_delays.push(delay);
        if let Some(number) = self.connection.take() {
            self.after(LATENCY, Due::LostAtTarget(number));
        }
        self.after(delay + LATENCY, Due::Connect);
    }

    fn perform_source(&mut self, action: source::Action) {
        use source::{Action, Event};
        match action {
            Action::Connect { delay } => self.reconnect(delay),
            Action::Send(message) => self.deliver_to_target(message),
            Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::SendMemory(message) => {
                assert!(self.source_guest.exists, "what was released can't be handed over");
                self.deliver_to_target(message);
            }
            Action::OpenStreams { verify } => {
                self.check_key(0);
                self.streams_verify = (verify, self.streams_verify.1);
                self.streams_open = true;
                self.after(LATENCY, Due::Source(Event::StreamsOpened));
            }
            Action::CloseStreams => {
                if self.streams_open {
                    self.end_streams();
                    let (code, sentence) = (AbortCode::Internal, "closed".to_owned());
                    self.after(LATENCY, Due::Target(target::Event::StreamFailed { code, sentence }));
                }
            }
            Action::ReopenStreams { verify, session, lacking } => {
                assert!(session > 0 && !self.streams_open);
                self.check_key(session);
                self.lacking.push(lacking);
                self.streams_verify = (verify, self.streams_verify.1);
                self.streams_open = true;
                self.after(LATENCY, Due::Source(Event::StreamsOpened));
            }
            Action::StartDirtyLog => {
                self.source_guest.dirty_log = true;
                self.after(VM_WORK, Due::Source(Event::DirtyLogStarted));
            }
            Action::ReadDirtyLog => {
                let pages = self.next_dirty_pages();
                self.after(VM_WORK, Due::Source(Event::DirtyLogRead { pages, took: VM_WORK }));
            }
            Action::StopDirtyLog => self.source_guest.dirty_log = false,
            Action::SendPages { pages, fence, paused, first: _, whole: _ } => {
                self.send_pages(&pages, fence, paused);
            }
            Action::PauseVm => {
                self.source_guest.runs = false;
                self.after(VM_WORK, Due::Source(Event::Paused));
            }
            Action::SaveState => {
                let (state, network) = (vec![5], ferry_protocol::message::NetworkIdentity::default());
                let saved = Event::StateSaved { state, network, runs: true, took: VM_WORK };
                self.after(VM_WORK, Due::Source(saved));
            }
            Action::ResumeVm => {
                assert!(self.source_guest.exists, "a released guest can't be resumed");
                self.source_guest.runs = true;
                self.after(VM_WORK, Due::Source(Event::VmResumed));
            }
            Action::ReleaseVm => self.source_guest = Guest::default(),
            Action::WriteRecord(record) => self.write_source_record(record, false),
            Action::RehearseRecord(record) => self.write_source_record(record, true),
            Action::Report(progress) => self.source_progress.push(progress),
            Action::Finish(outcome) => {
                assert!(self.source_outcome.replace(outcome).is_none(), "the source ends once");
                self.close();
            }
        }
    }

    /// Streams are opened only with what the target lets these in with.
    fn check_key(&self, session: u32) {
        assert_eq!(self.source.join_key(session), Some(SECRET.key(session)), "session {session}");
        assert_eq!(self.source.join_key(session + 1), None);
    }

    fn write_source_record(&mut self, record: Record, rehearsal: bool) {
        use source::Event;
        let took = self.source_disk.next_took();
        let event = if rehearsal {
            let written = self.source_disk.rehearse(record);
            written.map_or_else(Event::RehearsalFailed, |()| Event::RecordRehearsed { took })
        } else {
            let written = self.source_disk.write(record);
            written.map_or_else(Event::RecordFailed, |()| Event::RecordWritten { took })
        };
        self.after(took, Due::Source(event));
    }

    fn next_dirty_pages(&mut self) -> PageBitmap {
        let count = if self.dirty_pages.len() > 1 { self.dirty_pages.remove(0) } else { self.dirty_pages[0] };
        let mut pages = PageBitmap::empty(PAGES);
        (0..count.min(PAGES)).for_each(|page| pages.insert(page));
        pages
    }

    fn send_pages(&mut self, pages: &PageBitmap, fence: u32, paused: bool) {
        assert_eq!(paused, !self.source_guest.runs, "the cap is lifted while the guest stands still");
        if !self.streams_open {
            return;
        }
        self.round = pages.clone();
        self.sent.push(pages.clone());
        let count = pages.count();
        let by_link = PAGE_WORK * u32::try_from(count).unwrap();
        let took = if paused { by_link } else { by_link * self.slowed_by_cap };
        let base = u64::from(fence) * u64::from(STREAMS);
        let parts: Vec<_> = (0..u64::from(STREAMS)).map(|stream| digest(base + stream)).collect();
        let (here, there) = self.streams_verify;
        let sum = parts.iter().copied().fold(MemoryDigest::ZERO, MemoryDigest::combine);
        let sent = source::RoundSent {
            raw_pages: count,
            wire_bytes: count * 4096,
            link_idle: took - by_link,
            digest: if here { sum } else { MemoryDigest::ZERO },
            ..source::RoundSent::default()
        };
        self.after(took, Due::Source(source::Event::RoundSent(sent)));
        for (index, part) in (0..STREAMS).zip(parts) {
            let part = match (there, self.memory_differs) {
                (false, _) => MemoryDigest::ZERO,
                (true, true) => digest(999),
                (true, false) => part,
            };
            let stream = StreamIndex::new(index, STREAMS).unwrap();
            let reached = target::Event::FenceReached { stream, fence, digest: part };
            self.after(took + LATENCY, Due::Target(reached));
        }
    }

    /// As the engine does: the connection is closed behind the last message.
    pub(crate) fn close(&mut self) {
        if let Some(number) = self.connection {
            self.after(LATENCY, Due::Closed(number));
        }
    }

    fn deliver_to_target(&mut self, message: Message) {
        self.deliver(message, Due::ToTarget);
    }

    pub(crate) fn deliver_to_source(&mut self, message: Message) {
        self.deliver(message, Due::ToSource);
    }

    fn deliver(&mut self, message: Message, due: fn(u32, Message) -> Due) {
        let Some(number) = self.connection.filter(|_| !self.silent) else { return };
        if self.cut_at == Some(message.message_type()) {
            self.cut_at = None;
            return self.cut_control(20 * MS);
        }
        let mut decoder = wire::Decoder::default();
        decoder.push(&wire::encode(&message));
        let read = decoder.next_message().expect("our own bytes").expect("a whole message");
        assert_eq!(read, message);
        let is_pong = message.message_type() == MessageType::Pong;
        let late = is_pong.then(|| self.slow_pongs.pop_front()).flatten().unwrap_or_default();
        self.after(LATENCY + late, due(number, read));
    }
}
