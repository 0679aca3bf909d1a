//! The event loop, what must hold at every instant, and what must hold at the end.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use ferry_protocol::message::AbortCode;
use ferry_protocol::record::{Record, Standing};
use ferry_protocol::source::{self, Failure, Outcome, Source};
use ferry_protocol::target::{self, Target};
use ferry_protocol::{Epoch, MemoryDigest, MigrationId, PageDigest, StreamIndex, Timestamp, VmId};

use super::control::{Control, To};
use super::fault::{Bug, Injection, Round};
use super::guest::Guest;
use super::incoming::Incoming;
use super::memory::Memory;
use super::random::Random;
use super::scenario::{Scenario, Trouble, What, When};
use super::source::Streams;
use super::stream::Sender;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The target runs the guest.
    Moved,
    /// The source took the guest back after it had committed.
    Reclaimed,
    /// The guest stayed at the source; why, in a word.
    Stayed(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Moved => f.write_str("moved"),
            Self::Reclaimed => f.write_str("reclaimed"),
            Self::Stayed(why) => write!(f, "stayed: {why}"),
        }
    }
}

/// What a seed came to. Whatever must never happen has made [`run`] panic before.
#[derive(Debug, Clone)]
pub struct Report {
    /// How each attempt ended; only the last may be [`Ending::Moved`].
    pub endings: Vec<Ending>,
    /// Whether the injected bug found something to strike.
    pub struck: bool,
    /// Whether it left the memories different when they were compared.
    pub harmful: bool,
    /// Whether the digests showed that before the guest ran.
    pub caught: bool,
    /// Whether the source was ever in doubt about who runs the guest.
    pub doubted: bool,
    /// How often a broken link was made again.
    pub reconnections: u32,
    /// Pages that the guest and its devices wrote at the source.
    pub written_pages: u64,
    /// Pages that travelled.
    pub sent_pages: u64,
    /// How long it took, in the world's time.
    pub took: Duration,
}

/// What comes due at some time.
#[expect(clippy::large_enum_variant, reason = "a few hundred of them wait at most")]
#[derive(Debug)]
pub(super) enum Due {
    /// For the attempt of that number.
    Source(u32, source::Event),
    /// For the target's process of that number.
    Target(u32, target::Event),
    SourceJob(u32, source::Action),
    TargetJob(u32, target::Action),
    /// The attempt's connection attempt ends.
    Connect(u32),
    /// Bytes arrive on the control connection of that number.
    Control(u32, To, Vec<u8>),
    Lost(u32, To),
    Closed(u32),
    /// For the source, of the set of streams of that number.
    Stream(u32, source::Event),
    /// The set of streams of that number knocks at the target, with this number in its joins.
    Join(u32, u32),
    /// The source's ends of the set of streams of that number are closed.
    EndOfStreams(u32),
    /// A sender of the streams of that number goes on.
    Look(u32, StreamIndex),
    Write(u32, StreamIndex),
    /// A frame arrives.
    Frame(u32, StreamIndex, Vec<u8>),
    /// A frame that should never arrive does.
    LateFrame(StreamIndex, Vec<u8>),
    Trouble(What),
    RestartTarget,
    /// The next attempt begins.
    Begin,
}

/// One host's disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) record: Option<Record>,
    /// The coming writes that fail; true where the record lands all the same.
    faults: VecDeque<bool>,
    pub(super) failures: u32,
}

impl Disk {
    pub(super) fn fail_next(&mut self, lands: bool) {
        self.faults.push_back(lands);
    }

    pub(super) fn write(&mut self, record: &Record) -> Result<(), String> {
        let lands = self.faults.pop_front();
        if lands != Some(false) {
            self.record = Some(Record::decode(&record.encode()).expect("a record reads back"));
        }
        match lands {
            None => Ok(()),
            Some(_) => {
                self.failures += 1;
                Err("no space left on device".to_owned())
            }
        }
    }

    fn standing(&self) -> Option<(&'static str, u64)> {
        self.record.as_ref().map(|record| (record.standing.word(), record.epoch.number()))
    }
}

/// Two hosts, what is between them, and a clock that jumps from event to event.
pub(super) struct World {
    pub(super) now: Timestamp,
    pub(super) scenario: Scenario,
    pub(super) random: Random,
    pub(super) source: Source,
    pub(super) attempt: u32,
    pub(super) epoch: Epoch,
    pub(super) source_guest: Option<Guest>,
    pub(super) source_disk: Disk,
    pub(super) source_free_at: Timestamp,
    pub(super) target: Option<Target>,
    pub(super) process: u32,
    /// Memory that is being received.
    pub(super) target_memory: Option<Memory>,
    pub(super) target_guest: Option<Guest>,
    pub(super) target_disk: Disk,
    pub(super) target_free_at: Timestamp,
    pub(super) target_refuses: bool,
    pub(super) control: Control,
    pub(super) streams: Option<Streams>,
    /// The set of streams whose events the source takes in.
    pub(super) streams_at_source: Option<u32>,
    /// What the source knows of the streams that it has closed.
    pub(super) kept_senders: Vec<Sender>,
    pub(super) incoming: Option<Incoming>,
    pub(super) late_frame: Option<(StreamIndex, Vec<u8>)>,
    /// A page that was under way when the streams ended.
    pub(super) lost_page: Option<u64>,
    /// Nothing passes to the target, or to the source, before.
    pub(super) partition_until: [Timestamp; 2],
    pub(super) sessions: u32,
    /// How often a dirty log was asked for.
    pub(super) logs_read: u64,
    pub(super) round: Round,
    pub(super) injection: Injection,
    pub(super) bug: Option<Bug>,
    pub(super) troubles: Vec<Trouble>,
    /// The digest of the memory that the target began to run, taken over all pages.
    whole_digest: Option<MemoryDigest>,
    pub(super) report: Report,
    pub(super) queue: BTreeMap<(Timestamp, u64), Due>,
    sequence: u64,
    traced: bool,
}

/// How a seed is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Plan {
    /// The bug in the hosts, if there is one.
    pub bug: Option<Bug>,
    /// Whether the source also reads all of the paused guest's memory; drawn from the seed if not said.
    pub whole: Option<bool>,
}

/// Attempts before a seed's migration is left alone.
const ATTEMPTS_MAX: usize = 3;

/// More steps mean that the two sides go round in circles.
const STEPS_MAX: u64 = 400_000;

/// Plays the world of `seed` to its end, with the bug in the hosts if there is one (and then nothing else going
/// wrong). With `traced` every step goes to stderr.
///
/// # Panics
/// If anything happens that must not: two runners, none, a guest that runs on other bytes than it stopped with, a
/// digest that does not notice, a host that is not as empty or as whole as it should be.
#[must_use]
pub fn run(seed: u64, plan: Plan, traced: bool) -> Report {
    let mut world = World::new(seed, plan, traced);
    world.trace(|| format!("{:#?}", world.scenario));
    let mut steps = 0;
    while world.step() {
        steps += 1;
        assert!(steps < STEPS_MAX, "going round in circles, source {}", world.source.phase());
    }
    world.check_end();
    world.report.took = world.now.since(Timestamp::default());
    world.report
}

impl World {
    fn new(seed: u64, plan: Plan, traced: bool) -> Self {
        let bug = plan.bug;
        let mut random = Random::new(seed);
        let mut scenario = Scenario::draw(&mut random.fork(), bug);
        if let Some(whole) = plan.whole {
            scenario.verify_whole = whole;
        }
        let now = Timestamp::default();
        let mut guest = Guest::filled(&scenario.layout, &scenario.work, random.fork());
        guest.set_runs(true, now);
        let injection = Injection::new(bug, &mut random.fork());
        let troubles = scenario.troubles.clone();
        let config = config(&scenario, 1, Epoch::FIRST);
        let record = Record::of_own(config.vm, config.name.clone(), Epoch::FIRST, Standing::Running);
        let mut world = Self {
            now,
            source: Source::new(config, scenario.layout.clone(), now),
            attempt: 1,
            epoch: Epoch::FIRST,
            source_guest: Some(guest),
            source_disk: Disk { record: Some(record), ..Disk::default() },
            source_free_at: now,
            target: None,
            process: 1,
            target_memory: None,
            target_guest: None,
            target_disk: Disk::default(),
            target_free_at: now,
            target_refuses: false,
            control: Control::default(),
            streams: None,
            streams_at_source: None,
            kept_senders: Vec::new(),
            incoming: None,
            late_frame: None,
            lost_page: None,
            partition_until: [now; 2],
            sessions: 0,
            logs_read: 0,
            round: Round::default(),
            injection,
            bug,
            troubles,
            whole_digest: None,
            report: Report {
                endings: Vec::new(),
                struck: false,
                harmful: false,
                caught: false,
                doubted: false,
                reconnections: 0,
                written_pages: 0,
                sent_pages: 0,
                took: Duration::ZERO,
            },
            queue: BTreeMap::new(),
            sequence: 0,
            traced,
            scenario,
            random,
        };
        for trouble in world.troubles.clone() {
            if let When::After(delay) = trouble.when {
                world.after(delay, Due::Trouble(trouble.what));
            }
        }
        world
    }

    pub(super) fn trace(&self, text: impl FnOnce() -> String) {
        if self.traced {
            eprintln!("{:>12.6} {}", self.now.since(Timestamp::default()).as_secs_f64(), text());
        }
    }

    pub(super) fn after(&mut self, delay: Duration, due: Due) {
        self.at(self.now + delay, due);
    }

    /// The same, over a link that may be cut in either direction.
    pub(super) fn through_link(&mut self, delay: Duration, due: Due) {
        let at = (self.now + delay).max(self.partition_until[0]).max(self.partition_until[1]);
        self.at(at, due);
    }

    pub(super) fn at(&mut self, at: Timestamp, due: Due) {
        self.sequence += 1;
        self.queue.insert((at.max(self.now), self.sequence), due);
    }

    /// A time of about `us`, at most twice that.
    pub(super) fn about_us(&mut self, us: u64) -> Duration {
        Duration::from_micros(self.random.within(us / 2, us * 2))
    }

    pub(super) fn tell_source(&mut self, event: source::Event) {
        self.source.handle(self.now, event);
    }

    pub(super) fn tell_target(&mut self, event: target::Event) {
        if let Some(target) = &mut self.target {
            target.handle(self.now, event);
        }
    }

    /// Does all that is to be done now, then whatever is next; false at the end.
    fn step(&mut self) -> bool {
        loop {
            if let Some(action) = self.source.poll_action() {
                self.perform_source(action);
            } else if let Some(action) = self.target.as_mut().and_then(Target::poll_action) {
                self.perform_target(action);
            } else if !self.take_waiting() {
                break;
            }
            self.check();
        }
        let due = self.queue.first_key_value().map(|((at, _), _)| *at);
        let source = self.source.poll_timeout();
        let target = self.target.as_ref().and_then(Target::poll_timeout);
        let Some(at) = [due, source, target].into_iter().flatten().min() else {
            return false;
        };
        self.now = self.now.max(at);
        for guest in [&mut self.source_guest, &mut self.target_guest].into_iter().flatten() {
            guest.advance(self.now);
        }
        if due == Some(at) {
            let (_, due) = self.queue.pop_first().expect("it was there");
            self.happen(due);
        } else if source == Some(at) {
            self.trace(|| "the source's time has come".to_owned());
            self.tell_source(source::Event::Timeout);
        } else {
            self.trace(|| "the target's time has come".to_owned());
            self.tell_target(target::Event::Timeout);
        }
        self.check();
        true
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Source(attempt, event) if attempt == self.attempt => self.tell_source(event),
            Due::Target(process, event) if process == self.process => self.tell_target(event),
            Due::SourceJob(attempt, action) => self.source_job(attempt, action),
            Due::TargetJob(process, action) if process == self.process => self.target_job(action),
            Due::Connect(attempt) if attempt == self.attempt => self.connected(),
            Due::Source(..) | Due::Target(..) | Due::TargetJob(..) | Due::Connect(_) => {}
            Due::Control(number, to, bytes) => self.arrive(number, to, &bytes),
            Due::Lost(number, at) => self.lost(number, at),
            Due::Closed(number) => self.closed(number),
            Due::Stream(session, event) if self.streams_at_source == Some(session) => self.tell_source(event),
            Due::Stream(..) => {}
            Due::Join(session, join) => self.join(session, join),
            Due::EndOfStreams(session) => self.end_of_streams(session),
            // What is written behind the comparison is beyond what a comparison can see.
            Due::LateFrame(stream, bytes) if !self.round.paused => self.write_frame(stream, &bytes),
            Due::LateFrame(..) => {}
            Due::Look(session, stream) => self.look(session, stream),
            Due::Write(session, stream) => self.write(session, stream),
            Due::Frame(session, stream, bytes) => self.frame(session, stream, &bytes),
            Due::Trouble(what) => self.trouble(what),
            Due::RestartTarget => self.restart_target(),
            Due::Begin => self.begin_attempt(),
        }
    }

    fn begin_attempt(&mut self) {
        self.attempt += 1;
        self.trace(|| format!("attempt {}", self.attempt));
        self.troubles.clear();
        self.injection = Injection::new(None, &mut self.random.fork());
        self.round = Round::default();
        self.target_refuses = false;
        self.late_frame = None;
        self.lost_page = None;
        let config = config(&self.scenario, self.attempt, self.epoch);
        self.source = Source::new(config, self.scenario.layout.clone(), self.now);
    }

    /// What must hold at every instant.
    fn check(&self) {
        let source_runs = self.source_guest.as_ref().is_some_and(Guest::runs);
        let target_runs = self.target_guest.as_ref().is_some_and(Guest::runs);
        assert!(!(source_runs && target_runs), "two hosts run the guest");
        assert!(!source_runs || self.source.may_run(), "the source runs a guest that it gave away");
        if target_runs {
            let standing = self.target_disk.standing();
            assert!(
                matches!(standing, Some(("running", _))),
                "the target runs what it recorded as {standing:?}"
            );
        }
    }

    /// The memories are compared by digest: does the digest tell the truth?
    pub(super) fn judge(&mut self, digests_agree: bool) {
        let (source, target) = self.memories();
        let difference = source.first_difference(target);
        self.trace(|| format!("digests agree: {digests_agree}, first different page: {difference:?}"));
        if difference.is_some() {
            self.report.harmful = true;
            self.report.caught |= !digests_agree;
        }
        let log_bug = matches!(self.bug, Some(Bug::LostDirtyBit | Bug::ForgottenDeviceLog));
        let blind = log_bug && !self.scenario.verify_whole;
        if digests_agree {
            assert!(difference.is_none() || blind, "the digests agree, but page {difference:?} differs");
        } else {
            assert!(self.bug.is_some(), "the digests differ without a bug, first page {difference:?}");
        }
    }

    /// The guest is about to run at the target.
    pub(super) fn judge_run(&mut self) {
        let (source, target) = self.memories();
        if !self.report.harmful {
            assert_eq!(source.first_difference(target), None, "the guest would run on other bytes");
            self.whole_digest = Some(digest(target));
        }
        let guest = self.source_guest.as_ref().expect("a source keeps the guest until it has gone");
        assert!(!guest.runs(), "the source's guest stands still");
        assert!(!self.source.may_run(), "the source has given it away");
    }

    fn memories(&self) -> (&Memory, &Memory) {
        let source = &self.source_guest.as_ref().expect("the source has the guest").memory;
        (source, self.target_memory.as_ref().expect("the target has its memory"))
    }

    /// An attempt is over at the source.
    pub(super) fn source_ended(&mut self, outcome: &Outcome) {
        self.trace(|| format!("the source ends: {outcome:?}"));
        self.report.struck |= self.injection.struck;
        let ending = match outcome {
            Outcome::Moved(summary) => {
                assert_eq!(summary.epoch, self.epoch.next());
                assert_eq!(summary.digest, summary.target_digest);
                if let Some(whole) = self.whole_digest {
                    assert_eq!(summary.digest, whole, "the digest kept page by page is that of the memory");
                }
                Ending::Moved
            }
            Outcome::LetGo { .. } => unreachable!("nobody decides anything here"),
            Outcome::Stayed { failure, epoch } => {
                let guest = self.source_guest.as_ref().expect("it stayed");
                assert!(guest.runs(), "after a failure the source runs the guest");
                let reclaimed = matches!(failure, Failure::Link(text) if text.contains("discarded"));
                let by_whole =
                    matches!(failure, Failure::Local(text) if text.contains("the dirty log has missed"));
                assert!(
                    !by_whole || self.bug.is_some(),
                    "memory differs from what was sent of it without a bug"
                );
                self.report.harmful |= by_whole;
                self.report.caught |= by_whole;
                assert!(*epoch == self.epoch || epoch.number() == self.epoch.number() + 2, "epoch {epoch}");
                self.epoch = *epoch;
                if reclaimed { Ending::Reclaimed } else { Ending::Stayed(word(failure)) }
            }
        };
        let again = ending != Ending::Moved && self.report.endings.len() + 1 < ATTEMPTS_MAX;
        self.report.endings.push(ending);
        self.close(To::Target);
        if again {
            let pause = Duration::from_millis(self.random.pick(&[0, 1, 100, 2_000, 45_000]));
            self.after(pause + Duration::from_millis(1), Due::Begin);
        }
    }

    /// Nothing is left to happen.
    fn check_end(&self) {
        let moved = self.report.endings.last() == Some(&Ending::Moved);
        assert!(!self.report.endings.is_empty(), "the source ends, it was {}", self.source.phase());
        // A target whose source could not tell it of its release goes on answering, for as long as the guest runs.
        let answering = moved && self.target.as_ref().is_some_and(|target| target.phase() == "running");
        assert!(self.target.is_none() || answering, "the target ends");
        assert!(self.target_memory.is_none(), "the target keeps no memory that it does not run");
        assert_eq!(
            self.target_guest.as_ref().is_some_and(Guest::runs),
            moved,
            "the target runs it if it moved"
        );
        assert_eq!(self.source_guest.is_none(), moved, "the source has it if it stayed");
        let epoch = self.epoch.number();
        let (source, target) = (self.source_disk.standing(), self.target_disk.standing());
        if moved {
            assert_eq!(target, Some(("running", epoch + 1)));
            let exact = source == Some(("released", epoch + 1));
            assert!(exact || self.source_disk.failures > 0, "{source:?}");
            return;
        }
        let guest = self.source_guest.as_ref().expect("checked above");
        assert!(guest.runs() && !guest.logging(), "the guest is as it was before");
        let exact = source == Some(("running", epoch));
        assert!(exact || self.source_disk.failures > 0, "{source:?} in epoch {epoch}");
        let empty = matches!(target, None | Some(("discarded", _)));
        assert!(empty || self.target_disk.failures > 0 || self.process > 1, "{target:?}");
        assert!(!matches!(target, Some(("running", _))), "{target:?}");
    }
}

fn config(scenario: &Scenario, attempt: u32, epoch: Epoch) -> source::Config {
    source::Config {
        migration: MigrationId([u8::try_from(attempt).expect("few attempts"); 16]),
        vm: VmId([1; 16]),
        name: "web".parse().expect("a name"),
        epoch,
        arrived_by: None,
        target: "b:4444".to_owned(),
        witness: None,
        description: vec![1, 2, 3],
        memory: source::MemoryPath::Streams,
        streams: scenario.streams,
        compression: scenario.compression,
        verify: true,
        verify_whole: scenario.verify_whole,
        reconnect: scenario.reconnect,
        downtime_budget: scenario.budget,
        timeout: scenario.timeout,
        on_timeout: scenario.on_timeout,
    }
}

/// The digest of a memory, taken over all its pages at once.
pub(super) fn digest(memory: &Memory) -> MemoryDigest {
    let pages = (0..memory.page_count()).map(|page| PageDigest::of(page, memory.page(page)).alone());
    pages.fold(MemoryDigest::ZERO, MemoryDigest::combine)
}

fn word(failure: &Failure) -> String {
    match failure {
        Failure::Cancelled => "cancelled".to_owned(),
        Failure::Refused(abort) if abort.code == AbortCode::DigestDiffers => "digests differ".to_owned(),
        Failure::Refused(abort) => format!("refused ({:?})", abort.code),
        Failure::Link(_) => "link".to_owned(),
        Failure::Local(text) if text.contains("the dirty log has missed") => "log broken".to_owned(),
        Failure::Local(_) => "local".to_owned(),
        Failure::Protocol(text) => format!("protocol ({text})"),
        Failure::Timeout(_) => "timeout".to_owned(),
    }
}
