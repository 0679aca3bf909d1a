//! The source's whole state machine against a target that answers what it likes, while its own host does its work, sooner or
//! later, or fails at it. What it must never do is asserted here: above all, have the guest in two hands or in none, or leave
//! out a page that the target lacks.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "of most messages there is nothing to note or to check; the core takes them all"
)]

mod says;

use std::collections::VecDeque;
use std::time::Duration;

use ferry_protocol::message::{AtEpoch, FenceReached, NetworkIdentity};
use ferry_protocol::page::Compression;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::source::{
    Action, Config, Event, MemoryPath, OnTimeout, Outcome, Resolution, RoundSent, Source,
};
use ferry_protocol::witness::{Claim, Ruling, Verdict, Wish};
use ferry_protocol::{
    MemoryDigest, MemoryLayout, Message, MigrationId, PageBitmap, PageRange, Region, Timestamp,
};

use crate::bytes::Taker;
use crate::script::{
    ACTIONS_MAX, Disk, EPOCH, MIGRATION, ROUNDS_MAX, STEPS_MAX, VM, WITNESS, WORK, Witness, carried,
    check_sent, digest, pages, raw, see, split,
};

/// The steps, by their numbers.
pub mod steps {
    #![expect(missing_docs, reason = "they are what they are called")]
    pub const RAW: u8 = 0;
    pub const WELCOME: u8 = 1;
    pub const ADMIT: u8 = 2;
    pub const READY: u8 = 3;
    pub const FENCE_REACHED: u8 = 4;
    pub const PREPARED: u8 = 5;
    pub const RUNNING: u8 = 6;
    pub const DISCARDED: u8 = 7;
    pub const ABORT: u8 = 8;
    pub const PING: u8 = 9;
    pub const PONG: u8 = 10;
    pub const REHEARSED: u8 = 11;
    pub const ARRIVED: u8 = 12;
    pub const STREAM_FAILED: u8 = 13;
    pub const DISCONNECTED: u8 = 14;
    pub const CANCEL: u8 = 15;
    pub const RESOLVE: u8 = 16;
    pub const TIMEOUT: u8 = 17;
    pub const PASS: u8 = 18;
    pub const ANSWER: u8 = 19;
    pub const ANSWER_OTHER: u8 = 20;
    pub const FAIL: u8 = 21;
    pub const AT_ONCE: u8 = 22;
    pub const TARGET_CLAIMS: u8 = 23;
    pub const VM_FAILED: u8 = 24;
    pub const DIRTY: u8 = 25;
}

const PAGES: u64 = 512;

/// What can fail, in the order of the bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    Write,
    Rehearse,
    Connect,
    Streams,
    Vm,
    Resume,
    WitnessUnheard,
    WitnessHeard,
}

/// What the host is to do.
#[derive(Debug)]
enum Job {
    Connect,
    OpenStreams,
    StartLog,
    ReadLog,
    StopLog,
    SendPages { whole: bool },
    Pause,
    SaveState,
    Resume,
    Release,
    Write(Record),
    Rehearse(Record),
    Ask(Claim),
}

/// What was said of the commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    /// It was not sent.
    No,
    /// It was, and nobody has said what became of it.
    Doubted,
    /// The target has it.
    Away,
    /// It never runs at the target.
    Back,
}

/// The host around the core.
#[derive(Debug)]
struct Host {
    core: Source,
    layout: MemoryLayout,
    now: Timestamp,
    witness_named: bool,
    connected: bool,
    streams_open: bool,
    at_once: bool,
    failing: u8,
    in_order: VecDeque<Job>,
    others: VecDeque<Job>,
    disk: Disk,
    witness: Witness,
    given: Given,
    paused: bool,
    released: bool,
    /// What the next dirty logs name.
    dirty: u8,
    /// Pages that the target lacks.
    lacks: PageBitmap,
    /// The round that is not known to have arrived, and its fence.
    round: Option<PageBitmap>,
    fence: u32,
    reached: u32,
    /// What the target says has arrived of it, and the last of its answers.
    arrived: PageBitmap,
    arrived_reached: u32,
    /// What lacks of the round was put back.
    reopened: bool,
    session: u32,
    digest: MemoryDigest,
    finished: bool,
    seen: Vec<&'static str>,
}

/// Plays the script; the phases that it came to.
///
/// # Panics
/// If the core did what it must not.
#[must_use]
pub fn play(bytes: &[u8]) -> Vec<&'static str> {
    let mut taker = Taker(bytes);
    let mut host = Host::new(taker.byte(), taker.byte());
    host.drain();
    host.settle();
    for _ in 0..STEPS_MAX {
        if taker.0.is_empty() || host.finished {
            break;
        }
        let (what, how) = split(taker.byte());
        host.step(what, how, &mut taker);
        host.settle();
        host.check_alive();
    }
    host.seen
}

fn config(how: u8, more: u8) -> Config {
    Config {
        migration: MIGRATION,
        vm: VM,
        name: "web".parse().expect("a name"),
        epoch: EPOCH,
        arrived_by: (more & 1 != 0).then_some(MigrationId([8; 16])),
        target: "b:1".to_owned(),
        witness: (how & 2 != 0).then_some(WITNESS),
        description: vec![1],
        memory: if how & 1 == 0 { MemoryPath::Streams } else { MemoryPath::HandedOver },
        streams: 2,
        compression: if more & 2 == 0 { Compression::None } else { Compression::Auto },
        verify: how & 4 == 0,
        verify_whole: how & 16 != 0,
        downtime_budget: if more & 4 == 0 { Duration::from_secs(1) } else { Duration::from_millis(1) },
        timeout: Duration::from_secs(if more & 8 == 0 { 100 } else { 1 }),
        on_timeout: if how & 32 == 0 { OnTimeout::Stop } else { OnTimeout::Cancel },
        reconnect: Duration::from_secs(if how & 64 == 0 { 10 } else { 0 }),
    }
}

impl Host {
    fn new(how: u8, more: u8) -> Self {
        let layout = MemoryLayout::new(vec![Region { gpa: 0, bytes: PAGES * 4096 }]).expect("a layout");
        let config = config(how, more);
        let mut record = Record::of_own(VM, config.name.clone(), EPOCH, Standing::Running);
        record.arrived_by = config.arrived_by;
        let (now, witness_named) = (Timestamp::default(), config.witness.is_some());
        Self {
            core: Source::new(config, layout.clone(), now),
            layout,
            now,
            witness_named,
            connected: false,
            streams_open: false,
            at_once: how & 8 == 0,
            failing: 0,
            in_order: VecDeque::new(),
            others: VecDeque::new(),
            disk: Disk::new(Some(record)),
            witness: Witness::default(),
            given: Given::No,
            paused: false,
            released: false,
            dirty: 0,
            lacks: PageBitmap::full(PAGES),
            round: None,
            fence: 0,
            reached: 0,
            arrived: PageBitmap::empty(PAGES),
            arrived_reached: 0,
            reopened: false,
            session: 0,
            digest: MemoryDigest::ZERO,
            finished: false,
            seen: Vec::new(),
        }
    }

    fn step(&mut self, what: u8, how: u8, taker: &mut Taker<'_>) {
        match what {
            steps::STREAM_FAILED => self.handle(Event::StreamFailed("a stream broke".to_owned())),
            steps::DISCONNECTED if self.connected => {
                self.connected = false;
                self.handle(Event::Disconnected("reset".to_owned()));
            }
            steps::CANCEL => self.handle(Event::Cancel),
            steps::RESOLVE => {
                let (resolution, given) = match how % 3 {
                    0 => (Resolution::Resume, Given::Back),
                    1 => (Resolution::Discard, Given::Away),
                    _ => (Resolution::ResumeAlone, Given::Back),
                };
                // Where there is a witness it decides, unless it is to be passed over.
                let asks = self.witness_named && resolution == Resolution::Resume;
                if self.core.is_in_doubt() && !asks {
                    self.given = given;
                }
                self.handle(Event::Resolve(resolution));
            }
            steps::TIMEOUT => {
                self.now = self.core.poll_timeout().map_or(self.now, |due| due.max(self.now));
                self.tick();
            }
            steps::PASS => {
                self.now = self.now + WORK * (1 << (2 * how));
                self.tick();
            }
            steps::ANSWER => self.answer(true),
            steps::ANSWER_OTHER => self.answer(false),
            steps::FAIL => self.failing |= 1 << how,
            steps::AT_ONCE => self.at_once = how.is_multiple_of(2),
            steps::TARGET_CLAIMS => {
                let wish = if how.is_multiple_of(2) { Wish::Run } else { Wish::GiveUp };
                self.witness.hear(&Claim { vm: VM, epoch: EPOCH.next(), migration: MIGRATION, wish });
            }
            steps::VM_FAILED => self.handle(Event::VmFailed("it ended".to_owned())),
            steps::DIRTY => self.dirty = how,
            _ => {
                let message = if what == steps::RAW { raw(taker) } else { self.message(what, how) };
                let message = message.and_then(|message| carried(&message)).filter(|_| self.connected);
                if let Some(message) = message {
                    self.hear(message);
                }
            }
        }
    }

    fn hear(&mut self, message: Message) {
        let (phase, given) = (self.core.phase(), EPOCH.next());
        match &message {
            Message::FenceReached(FenceReached { fence }) if phase == "pre-copy" && *fence == self.fence => {
                if let Some(round) = self.round.take() {
                    self.lacks.subtract(&round);
                    self.reached = *fence;
                }
            }
            Message::Arrived(answer) => {
                self.arrived_reached = answer.reached;
                let runs = answer.runs.iter();
                let ranges = runs.filter_map(|run| PageRange::new(run.first, run.count, &self.layout));
                ranges.for_each(|range| self.arrived.insert_range(range));
            }
            Message::Running(running) if running.epoch == given && phase == "committed" => {
                self.given = Given::Away;
            }
            Message::Discarded(AtEpoch { epoch }) if *epoch == given && phase == "committed" => {
                self.given = Given::Back;
            }
            _ => {}
        }
        self.handle(Event::Message(message));
    }

    fn tick(&mut self) {
        if self.core.poll_timeout().is_some_and(|due| due <= self.now) {
            self.handle(Event::Timeout);
            let next = self.core.poll_timeout();
            assert!(next.is_none_or(|next| next > self.now), "woken for nothing while {}", self.core.phase());
        }
    }

    fn handle(&mut self, event: Event) {
        if self.finished {
            return;
        }
        self.now = self.now + WORK;
        self.core.handle(self.now, event);
        self.drain();
    }

    fn drain(&mut self) {
        see(&mut self.seen, self.core.phase());
        if self.core.phase() == "pre-copy" && std::mem::take(&mut self.reopened) {
            self.round = None;
        }
        let mut count = 0;
        while let Some(action) = self.core.poll_action() {
            assert!(!self.finished, "{action:?} after the end");
            count += 1;
            self.act(action);
        }
        assert!(count <= ACTIONS_MAX, "{count} actions for one event");
        let owned = matches!(self.given, Given::No | Given::Back);
        assert!(owned || !self.core.may_run(), "it was given away, and may run");
        assert!(self.given != Given::Back || self.core.may_run(), "it is this host's, and may not run");
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Connect { .. } => {
                self.connected = false;
                self.others.push_back(Job::Connect);
            }
            Action::Send(message) | Action::SendMemory(message) => self.check_said(&message),
            Action::OpenStreams { .. } => self.others.push_back(Job::OpenStreams),
            Action::CloseStreams => {
                self.streams_open = false;
                // What was under way on them never ends.
                self.others.retain(|job| !matches!(job, Job::OpenStreams | Job::SendPages { .. }));
            }
            Action::ReopenStreams { session, lacking, .. } => self.reopen(session, &lacking),
            Action::StartDirtyLog => self.in_order.push_back(Job::StartLog),
            Action::ReadDirtyLog => self.in_order.push_back(Job::ReadLog),
            Action::StopDirtyLog => self.in_order.push_back(Job::StopLog),
            Action::SendPages { pages, fence, paused, whole, first } => {
                assert_eq!((pages.page_count(), paused), (PAGES, self.paused));
                assert!(fence > self.fence, "fence {fence} after {}", self.fence);
                assert_eq!(first, self.reached == 0, "whether the target has a whole round");
                let mut left_out = self.lacks.clone();
                left_out.subtract(&pages);
                assert_eq!(left_out.count(), 0, "pages that the target lacks are not sent");
                (self.fence, self.round) = (fence, Some(pages));
                self.digest = digest(usize::try_from(fence % 4).unwrap_or_default() + 1);
                self.others.push_back(Job::SendPages { whole });
            }
            Action::PauseVm => self.in_order.push_back(Job::Pause),
            Action::SaveState => self.in_order.push_back(Job::SaveState),
            Action::ResumeVm => {
                assert!(self.core.may_run() && !self.released, "it is resumed here, and is not this host's");
                self.in_order.push_back(Job::Resume);
            }
            Action::ReleaseVm => {
                assert!(
                    self.given == Given::Away && !self.core.may_run(),
                    "it is released, and nobody has it"
                );
                self.released = true;
                self.in_order.push_back(Job::Release);
            }
            Action::WriteRecord(record) => self.in_order.push_back(Job::Write(record)),
            Action::RehearseRecord(record) => self.in_order.push_back(Job::Rehearse(record)),
            Action::AskWitness(claim) => {
                // Also when the operator has taken it back, so that the target gets no leave any more.
                assert!(matches!(self.given, Given::Doubted | Given::Back), "nothing is in doubt");
                assert!(self.witness_named && claim.epoch == EPOCH.next());
                self.others.push_back(Job::Ask(claim));
            }
            Action::Report(_) => {}
            Action::Finish(outcome) => self.finish(&outcome),
        }
    }

    fn reopen(&mut self, session: u32, lacking: &PageBitmap) {
        assert_eq!(lacking.page_count(), PAGES);
        assert!(session == self.session && session > 0, "another session than was named");
        let round = self.round.clone().unwrap_or_else(|| PageBitmap::empty(PAGES));
        // All of the round has arrived if its fence was reached. Otherwise it is asked for again if the link breaks before
        // pre-copy goes on.
        let mut expected = round.clone();
        self.reopened = true;
        if self.arrived_reached == self.fence {
            (self.reached, self.round) = (self.fence, None);
            expected.subtract(&round);
        } else {
            expected.subtract(&self.arrived);
        }
        assert!(*lacking == expected, "{} pages lack, not {}", expected.count(), lacking.count());
        self.lacks.subtract(&round);
        self.lacks.union(lacking);
        self.others.push_back(Job::OpenStreams);
    }

    fn check_said(&mut self, message: &Message) {
        check_sent(message);
        match message {
            Message::Commit(AtEpoch { epoch }) => {
                let of_it = |record: &Record| {
                    let committed = matches!(record.standing, Standing::Committed { .. });
                    committed && record.epoch == *epoch && record.migration == Some(MIGRATION)
                };
                assert!(self.disk.certainly(of_it), "a commit that is not recorded");
                assert!(self.paused && *epoch == EPOCH.next() && !self.core.may_run());
                assert!(matches!(self.given, Given::No | Given::Doubted), "it was decided");
                self.given = Given::Doubted;
            }
            Message::Released(_) => assert_eq!(self.given, Given::Away, "released to nobody"),
            Message::Abort(_) => assert_eq!(self.given, Given::No, "a commit is not called back"),
            Message::Resume(resume) => {
                assert_eq!(self.given, Given::No, "it was committed");
                assert!(resume.session >= self.session && resume.reached == self.reached);
                if resume.from == 0 {
                    self.arrived = PageBitmap::empty(PAGES);
                }
                self.session = resume.session;
            }
            Message::Prepare(prepare) => {
                assert!(self.paused, "it runs on");
                let mut left_out = self.lacks.clone();
                left_out.subtract(&self.round.clone().unwrap_or_else(|| PageBitmap::empty(PAGES)));
                let handed_over = prepare.fence == 0;
                assert!(handed_over || left_out.count() == 0, "pages that the target lacks");
            }
            _ => {}
        }
    }

    fn finish(&mut self, outcome: &Outcome) {
        self.finished = true;
        let resumes = self.in_order.iter().any(|job| matches!(job, Job::Resume));
        match outcome {
            Outcome::Moved(summary) => {
                assert!(self.released && summary.epoch == EPOCH.next(), "it was not moved");
            }
            Outcome::LetGo { epoch } => assert!(self.released && *epoch == EPOCH.next()),
            Outcome::Stayed { epoch, .. } => {
                assert!(!self.released && self.core.may_run(), "it did not stay");
                let failed = self.failing_resume();
                assert!(!self.paused || resumes || failed, "it stayed, and stands still");
                let skipped = if self.given == Given::No { EPOCH } else { EPOCH.next().next() };
                assert!(*epoch >= skipped, "it stays in epoch {epoch}");
            }
        }
    }

    /// Whether resuming it has just failed.
    const fn failing_resume(&self) -> bool {
        self.failing & 1 << (Fails::Resume as u8) != 0
    }

    fn fails(&mut self, what: Fails) -> bool {
        let bit = 1 << (what as u8);
        let fails = self.failing & bit != 0;
        self.failing &= !bit;
        fails
    }

    fn answer(&mut self, in_order: bool) {
        let queue = if in_order { &mut self.in_order } else { &mut self.others };
        if let Some(event) = queue.pop_front().and_then(|job| self.done(job)) {
            self.handle(event);
        }
    }

    fn done(&mut self, job: Job) -> Option<Event> {
        let (took, why) = (WORK, || "it failed".to_owned());
        Some(match job {
            Job::Connect if self.fails(Fails::Connect) => Event::Disconnected(why()),
            Job::Connect => {
                self.connected = true;
                Event::Connected
            }
            Job::OpenStreams if self.fails(Fails::Streams) => Event::StreamFailed(why()),
            Job::OpenStreams => {
                self.streams_open = true;
                Event::StreamsOpened
            }
            Job::StartLog | Job::Pause | Job::SaveState if self.fails(Fails::Vm) => Event::VmFailed(why()),
            Job::StartLog => Event::DirtyLogStarted,
            Job::ReadLog => {
                let pages = pages(PAGES, self.dirty);
                self.lacks.union(&pages);
                Event::DirtyLogRead { pages, took }
            }
            Job::StopLog | Job::Release => return None,
            Job::SendPages { .. } if self.fails(Fails::Streams) => Event::StreamFailed(why()),
            Job::SendPages { whole } => Event::RoundSent(RoundSent {
                raw_pages: self.round.as_ref().map_or(0, PageBitmap::count),
                wire_bytes: 4096,
                digest: self.digest,
                whole_digest: whole.then_some(self.digest),
                ..RoundSent::default()
            }),
            Job::Pause => {
                self.paused = true;
                Event::Paused
            }
            Job::SaveState => {
                Event::StateSaved { state: vec![1], network: NetworkIdentity::default(), runs: true, took }
            }
            // The bit stays, so that it is known at the end.
            Job::Resume if self.failing_resume() => Event::ResumeFailed(why()),
            Job::Resume => {
                assert!(!self.released, "what was released is resumed");
                self.paused = false;
                Event::VmResumed
            }
            Job::Write(record) => {
                let fails = self.fails(Fails::Write);
                self.disk.write(record, fails);
                if fails { Event::RecordFailed(why()) } else { Event::RecordWritten { took } }
            }
            Job::Rehearse(record) => {
                assert!(self.disk.holds(&record), "a rehearsal changes the record to {record:?}");
                let fails = self.fails(Fails::Rehearse);
                if fails { Event::RehearsalFailed(why()) } else { Event::RecordRehearsed { took } }
            }
            Job::Ask(claim) => return Some(self.ask(&claim)),
        })
    }

    fn ask(&mut self, claim: &Claim) -> Event {
        let silent = || Event::WitnessSilent("nobody answers".to_owned());
        if self.fails(Fails::WitnessUnheard) {
            return silent();
        }
        let ruling = self.witness.hear(claim);
        if self.fails(Fails::WitnessHeard) {
            return silent();
        }
        let Some(ruling) = ruling else { return silent() };
        if self.core.phase() == "committed" {
            self.given = match ruling {
                Ruling::Target => Given::Away,
                Ruling::Source => Given::Back,
            };
        }
        if ruling == Ruling::Target {
            assert!(self.witness.0.is_some_and(|entry| entry.verdict == Verdict::Released));
        }
        Event::WitnessSays(ruling)
    }

    fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            if !self.at_once || (self.in_order.is_empty() && self.others.is_empty()) {
                return;
            }
            self.answer(!self.in_order.is_empty());
        }
        panic!("it goes round in circles while {}", self.core.phase());
    }

    /// A core that is not finished has something to wait for.
    fn check_alive(&self) {
        let works = !self.in_order.is_empty() || !self.others.is_empty();
        let waits = self.connected || self.core.poll_timeout().is_some();
        assert!(self.finished || works || waits, "nothing ends {}", self.core.phase());
        assert_eq!(self.finished, self.core.phase() == "finished");
    }
}
