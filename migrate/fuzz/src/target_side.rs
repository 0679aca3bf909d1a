//! The target's whole state machine against a source that says what it likes, while its own host does its work, sooner or later,
//! or fails at it. What it must never do is asserted here: above all, run the guest without a commit and a record of that.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "of most messages there is nothing to note or to check; the core takes them all"
)]

mod says;

use std::collections::{BTreeMap, VecDeque};

use ferry_protocol::admission::JoinSecret;
use ferry_protocol::message::{AtEpoch, Hello};
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::target::{Action, Config, Event, Target};
use ferry_protocol::witness::{Claim, Ruling, Verdict, Wish, WitnessId};
use ferry_protocol::{
    Epoch, MemoryDigest, MemoryLayout, Message, MigrationId, PageBitmap, StreamIndex, Timestamp,
};

use crate::bytes::Taker;
use crate::script::{
    ACTIONS_MAX, Disk, EPOCH, MIGRATION, ROUNDS_MAX, STEPS_MAX, VM, WITNESS, WORK, Witness, carried,
    check_sent, code, digest, pages, raw, see, split,
};

/// The steps, by their numbers.
pub mod steps {
    #![expect(missing_docs, reason = "they are what they are called")]
    pub const RAW: u8 = 0;
    pub const HELLO: u8 = 1;
    pub const WITNESS_NAMED: u8 = 2;
    pub const DESCRIBE: u8 = 3;
    pub const HAND_OVER: u8 = 4;
    pub const KEEP_FOR: u8 = 5;
    pub const FENCE: u8 = 6;
    pub const FENCE_OF_ONE: u8 = 7;
    pub const FENCE_OF_ANY: u8 = 8;
    pub const STOPPING: u8 = 9;
    pub const STATE: u8 = 10;
    pub const PREPARE: u8 = 11;
    pub const COMMIT: u8 = 12;
    pub const RELEASED: u8 = 13;
    pub const ABORT: u8 = 14;
    pub const PING: u8 = 15;
    pub const PONG: u8 = 16;
    pub const REHEARSE: u8 = 17;
    pub const RESUME: u8 = 18;
    pub const DISCONNECTED: u8 = 19;
    pub const CONNECTED: u8 = 20;
    pub const STREAM_FAILED: u8 = 21;
    pub const CANCEL: u8 = 22;
    pub const TIMEOUT: u8 = 23;
    pub const PASS: u8 = 24;
    pub const ANSWER: u8 = 25;
    pub const ANSWER_OTHER: u8 = 26;
    pub const FAIL: u8 = 27;
    pub const TAKE_BACK: u8 = 28;
    pub const AT_ONCE: u8 = 29;
    pub const ARRIVED: u8 = 30;
}

/// A guest larger than this is refused by the host.
const PAGES_MAX: u64 = 1 << 16;

/// What can fail, in the order of the bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    Write,
    Rehearse,
    Build,
    Restore,
    Run,
    RunHalfWay,
    WitnessUnheard,
    WitnessHeard,
}

/// What the host is to do.
#[derive(Debug)]
enum Job {
    Write(Record),
    Rehearse(Record),
    Build(MemoryLayout, Option<u16>),
    Restore,
    Run,
    Discard,
    EndStreams,
    Probe,
    Ask(Claim),
    HangUp,
}

/// The host around the core.
#[derive(Debug)]
struct Host {
    core: Target,
    now: Timestamp,
    witness_named: Option<WitnessId>,
    /// Who came first, if somebody did.
    hello: Option<Hello>,
    connected: bool,
    /// Whether answers come at once.
    at_once: bool,
    failing: u8,
    /// Work on the VM and its record, which keeps its order.
    in_order: VecDeque<Job>,
    /// Other work.
    others: VecDeque<Job>,
    disk: Disk,
    before: Option<Record>,
    witness: Witness,
    /// Pages and, unless it was handed over, streams of the machine.
    machine: Option<(u64, Option<u16>)>,
    /// The machine is gone, or its end was asked for.
    discarded: bool,
    streams_open: bool,
    /// Session of the streams, the largest that was let in.
    session: u32,
    /// The last fence that was reached, and memory's digest then.
    fence: u32,
    digest: MemoryDigest,
    /// Which streams have reached which fences that not all have.
    fences: BTreeMap<u32, u32>,
    /// What has arrived behind fences when streams ended, and how much of it comes next.
    here: Option<PageBitmap>,
    arriving: u8,
    /// The epoch for which it is prepared, and for which a commit came then.
    prepared: Option<Epoch>,
    committed: Option<Epoch>,
    restored: bool,
    /// The source said that it has let go.
    released: bool,
    /// The guest was started, even if it broke off.
    ran: bool,
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

/// A record that stands before the source comes.
fn record(how: u8) -> Option<Record> {
    let next = EPOCH.next();
    let of = |epoch, standing, migration, arrived_by| Record {
        vm: VM,
        name: "web".parse().expect("a name"),
        epoch,
        standing,
        migration,
        arrived_by,
    };
    let (own, other) = (Some(MIGRATION), Some(MigrationId([8; 16])));
    match how % 8 {
        1 => Some(of(next, Standing::Receiving { source: "a".into() }, own, None)),
        2 => Some(of(next, Standing::Discarded, own, None)),
        3 => Some(of(next, Standing::Running, None, own)),
        4 => Some(of(EPOCH, Standing::Released { target: "a".into() }, other, None)),
        5 => Some(of(next, Standing::Discarded, other, None)),
        6 => Some(of(EPOCH, Standing::Committed { target: "a".into() }, other, None)),
        7 => Some(of(next.next(), Standing::Stopped, None, other)),
        _ => None,
    }
}

impl Host {
    fn new(how: u8, record_how: u8) -> Self {
        let before = record(record_how);
        let config = Config {
            host: "b".to_owned(),
            source: "a".to_owned(),
            carries_descriptors: how & 1 != 0,
            name: None,
            record: before.clone(),
            witness: (how & 2 != 0).then_some(WITNESS),
        };
        let witness_named = config.witness;
        let now = Timestamp::default();
        let core = Target::new(config, now);
        let core = if how & 4 == 0 { core.with_admission(JoinSecret([1; 32])) } else { core };
        Self {
            core,
            now,
            witness_named,
            hello: None,
            connected: true,
            at_once: how & 8 == 0,
            failing: 0,
            in_order: VecDeque::new(),
            others: VecDeque::new(),
            disk: Disk::new(before.clone()),
            before,
            witness: Witness::default(),
            machine: None,
            discarded: false,
            streams_open: false,
            session: 0,
            fence: 0,
            digest: MemoryDigest::ZERO,
            fences: BTreeMap::new(),
            here: None,
            arriving: 0,
            prepared: None,
            committed: None,
            restored: false,
            released: false,
            ran: false,
            finished: false,
            seen: Vec::new(),
        }
    }

    fn step(&mut self, what: u8, how: u8, taker: &mut Taker<'_>) {
        match what {
            steps::CONNECTED => self.connect(how),
            steps::FENCE => (0..self.streams()).for_each(|stream| self.fence_reached(stream, self.fence + 1)),
            steps::FENCE_OF_ONE => self.fence_reached(u16::from(how), self.fence + 1),
            steps::FENCE_OF_ANY => self.fence_reached(u16::from(how), u32::from(taker.byte())),
            steps::DISCONNECTED => self.disconnect(),
            steps::STREAM_FAILED if self.streams_open => {
                let sentence = "a stream broke".to_owned();
                self.handle(Event::StreamFailed { code: code(how), sentence });
            }
            steps::CANCEL => self.handle(Event::Cancel),
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
            steps::TAKE_BACK => {
                let (migration, epoch) = (self.migration(), self.epoch());
                self.witness.hear(&Claim { vm: VM, epoch, migration, wish: Wish::TakeBack });
            }
            steps::AT_ONCE => self.at_once = how.is_multiple_of(2),
            steps::ARRIVED => self.arriving = how,
            _ => {
                let message = if what == steps::RAW { raw(taker) } else { self.message(what, how) };
                let message = message.and_then(|message| carried(&message)).filter(|_| self.connected);
                if let Some(message) = message {
                    self.hear(message);
                }
            }
        }
    }

    /// Of whoever came.
    fn migration(&self) -> MigrationId {
        self.hello.as_ref().map_or(MIGRATION, |hello| hello.migration)
    }

    /// The epoch that it would give away.
    fn epoch(&self) -> Epoch {
        self.hello.as_ref().map_or(EPOCH, |hello| hello.epoch).next()
    }

    /// Somebody connects and introduces themselves: sorted as the engine does.
    fn connect(&mut self, how: u8) {
        let hello = self.hello(how | 1);
        let fresh = self.hello(how & !1);
        if how & 1 == 0 && self.core.resumed_by(&hello) {
            self.connected = true;
            self.handle(Event::Reconnected);
        } else if how & 1 == 1 && self.core.superseded_by(&fresh) {
            assert!(!self.ran, "a guest that was started is not superseded");
            self.handle(Event::Cancel);
        }
    }

    fn disconnect(&mut self) {
        if std::mem::replace(&mut self.connected, false) {
            self.handle(Event::Disconnected("reset".to_owned()));
        }
    }

    fn streams(&self) -> u16 {
        self.machine.filter(|_| self.streams_open).and_then(|(_, streams)| streams).unwrap_or_default()
    }

    fn fence_reached(&mut self, stream: u16, fence: u32) {
        let streams = self.streams();
        let Some(stream) = StreamIndex::new(stream % streams.max(1), streams) else { return };
        let part = |stream: u16| digest(1 + usize::from(stream));
        let reached = self.fences.entry(fence).or_default();
        *reached |= 1 << stream.number();
        if reached.count_ones() == u32::from(streams) && fence > self.fence {
            self.fences.remove(&fence);
            self.fence = fence;
            self.digest = (0..streams).map(part).fold(MemoryDigest::ZERO, MemoryDigest::combine);
        }
        let part = part(stream.number());
        self.handle(Event::FenceReached { stream, fence, digest: part });
    }

    fn hear(&mut self, message: Message) {
        match &message {
            Message::Hello(hello) if self.core.phase() == "greeting" => self.hello = Some(hello.clone()),
            Message::Commit(AtEpoch { epoch }) if self.prepared == Some(*epoch) => {
                self.committed = Some(*epoch);
            }
            Message::Released(AtEpoch { epoch }) => self.released |= self.committed == Some(*epoch),
            // One that was overtaken by another says nothing.
            Message::Resume(resume) if self.committed.is_none() && resume.session > self.session => {
                (self.prepared, self.restored) = (None, false);
            }
            _ => {}
        }
        self.handle(Event::Message(message));
    }

    /// Time has passed.
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
        see(&mut self.seen, self.core.phase());
        let mut count = 0;
        while let Some(action) = self.core.poll_action() {
            assert!(!self.finished, "{action:?} after the end");
            count += 1;
            self.act(action);
        }
        assert!(count <= ACTIONS_MAX, "{count} actions for one event");
        assert!(!self.core.may_run() || self.has_leave(), "it may run while {}", self.core.phase());
    }

    /// Whether the guest may run here, by what can be seen from outside: it was committed to this host, the witness gave leave
    /// if there is one, and that is on disk for sure.
    fn has_leave(&self) -> bool {
        let Some(epoch) = self.committed else { return false };
        let witnessed = self.witness_named.is_none()
            || self.released
            || self
                .witness
                .0
                .is_some_and(|entry| entry.epoch == epoch && entry.verdict != Verdict::Discarded);
        let starts = |record: &Record| {
            let own = record.standing == Standing::Running && record.epoch == epoch;
            own && record.arrived_by == Some(self.migration())
        };
        witnessed && self.restored && self.disk.certainly(starts)
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.check_said(&message),
            Action::WriteRecord(record) => self.in_order.push_back(Job::Write(record)),
            Action::RehearseRecord(record) => self.in_order.push_back(Job::Rehearse(record)),
            Action::BuildMachine { layout, streams, .. } => {
                self.in_order.push_back(Job::Build(layout, Some(streams)));
            }
            Action::AdoptMemory { layout, .. } => self.in_order.push_back(Job::Build(layout, None)),
            Action::RestoreState(_) => {
                assert!(self.machine.is_some() && !self.discarded && !self.ran, "nothing to restore");
                self.restored = false;
                self.in_order.push_back(Job::Restore);
            }
            Action::RunVm { .. } => {
                assert!(self.core.may_run() && self.has_leave(), "it is run without leave");
                assert!(!self.discarded && !self.ran, "there is nothing to run, or it runs already");
                self.in_order.push_back(Job::Run);
            }
            Action::DiscardMachine => {
                assert!(!self.ran && !self.core.may_run(), "a guest that was started is discarded");
                self.discarded = true;
                self.in_order.push_back(Job::Discard);
            }
            Action::EndStreams => self.others.push_back(Job::EndStreams),
            Action::ExpectStreams { session, digest } => {
                assert!(session > self.session, "session {session} after {}", self.session);
                assert!(!self.streams_open && digest == self.digest, "the old streams have not ended");
                (self.session, self.streams_open) = (session, true);
            }
            Action::ProbeWitness => self.others.push_back(Job::Probe),
            Action::AskWitness(claim) => {
                assert_eq!(claim.migration, self.migration());
                assert!(self.committed == Some(claim.epoch), "a claim to what was not committed");
                self.others.push_back(Job::Ask(claim));
            }
            Action::HangUp => self.others.push_back(Job::HangUp),
            Action::DropStaleFrames => assert!(self.machine.is_some() && !self.discarded),
            Action::Announce(_) => assert!(self.ran, "announced before it runs"),
            Action::Report(_) => {}
            Action::Finish(_) => self.finished = true,
        }
    }

    fn check_said(&mut self, message: &Message) {
        check_sent(message);
        match message {
            Message::Prepared(prepared) => {
                assert!(self.restored && prepared.digest == self.digest, "it is not prepared");
                self.prepared = Some(prepared.epoch);
            }
            Message::Running(running) => {
                let before = self.before.as_ref();
                let told = before.is_some_and(|record| record.ran(self.migration(), running.epoch));
                assert!(told || (self.ran && self.has_leave()), "it does not run here");
            }
            Message::Discarded(AtEpoch { epoch }) => {
                assert!(!self.ran, "it was started, and is given back");
                let entry = self.witness.0.filter(|_| self.witness_named.is_some());
                let leave = entry.is_some_and(|it| it.epoch == *epoch && it.verdict != Verdict::Discarded);
                assert!(!leave || self.released, "the witness says that it is this target's");
                let of_it = |record: &Record| record.epoch == *epoch && given_up(&record.standing);
                assert!(self.disk.certainly(of_it), "{:?} may be on disk", self.disk);
            }
            Message::Arrived(arrived) => {
                let here = self.here.as_ref().expect("streams have ended");
                let mut at = 0;
                for run in &arrived.runs {
                    assert!(run.count > 0 && run.first >= at, "runs that are not in order");
                    at = run.first + run.count;
                    assert!((run.first..at).all(|page| here.contains(page)), "a page that is not here");
                }
                assert_eq!(arrived.reached, self.fence);
            }
            Message::FenceReached(reached) => {
                assert_eq!(reached.fence, self.fence, "not all have reached it")
            }
            _ => {}
        }
    }

    fn fails(&mut self, what: Fails) -> bool {
        let bit = 1 << (what as u8);
        let fails = self.failing & bit != 0;
        self.failing &= !bit;
        fails
    }

    /// The host is done with what it has been asked first, of what keeps its order or of the rest.
    fn answer(&mut self, in_order: bool) {
        let queue = if in_order { &mut self.in_order } else { &mut self.others };
        if let Some(event) = queue.pop_front().and_then(|job| self.done(job)) {
            self.handle(event);
        }
    }

    fn done(&mut self, job: Job) -> Option<Event> {
        let (took, why) = (WORK, || "it failed".to_owned());
        Some(match job {
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
            Job::Build(layout, streams) => {
                if self.fails(Fails::Build) || layout.page_count() > PAGES_MAX {
                    return Some(Event::BuildFailed { code: code(5), sentence: why() });
                }
                self.machine = Some((layout.page_count(), streams));
                self.streams_open = streams.is_some();
                Event::MachineBuilt
            }
            Job::Restore if self.fails(Fails::Restore) => Event::RestoreFailed(why()),
            Job::Restore => {
                self.restored = true;
                Event::StateRestored { took }
            }
            Job::Run if self.fails(Fails::Run) => Event::RunFailed(why()),
            Job::Run => {
                self.ran = true;
                if self.fails(Fails::RunHalfWay) { Event::RunBroke(why()) } else { Event::VmRunning { took } }
            }
            Job::Discard => return None,
            Job::EndStreams => {
                let (page_count, _) = self.machine.expect("it has streams");
                self.streams_open = false;
                self.fences.clear();
                let arrived = pages(page_count, self.arriving);
                self.digest = digest(4 + usize::from(self.arriving % 4));
                self.here.get_or_insert_with(|| PageBitmap::empty(page_count)).union(&arrived);
                Event::StreamsEnded { arrived, digest: self.digest }
            }
            Job::Probe if self.fails(Fails::WitnessUnheard) => Event::WitnessSilent(why()),
            Job::Probe => Event::WitnessProbed { took },
            Job::Ask(claim) => return Some(self.ask(&claim)),
            Job::HangUp => {
                self.connected = false;
                Event::Disconnected("closed".to_owned())
            }
        })
    }

    fn ask(&mut self, claim: &Claim) -> Event {
        let silent = || Event::WitnessSilent("nobody answers".to_owned());
        if self.fails(Fails::WitnessUnheard) {
            return silent();
        }
        let ruling: Option<Ruling> = self.witness.hear(claim);
        if self.fails(Fails::WitnessHeard) {
            return silent();
        }
        ruling.map_or_else(silent, Event::WitnessSays)
    }

    /// Whatever is answered at once is answered.
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
        let phase = self.core.phase();
        // Whoever runs the guest answers for as long as it does.
        let waits = self.connected || self.core.poll_timeout().is_some() || phase == "running";
        assert!(self.finished || works || waits, "nothing ends {phase}");
        assert_eq!(self.finished, phase == "finished");
    }
}

const fn given_up(standing: &Standing) -> bool {
    matches!(standing, Standing::Receiving { .. } | Standing::Discarded)
}
