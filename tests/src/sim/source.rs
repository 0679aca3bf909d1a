//! What the source's host does for its core.

use std::time::Duration;

use ferry_protocol::message::NetworkIdentity;
use ferry_protocol::source::{Action, Event, Progress, RoundSent};
use ferry_protocol::{PageBitmap, StreamIndex, Timestamp};

use super::control::To;
use super::fault::Round;
use super::guest::Guest;
use super::scenario::When;
use super::stream::{Sender, Written};
use super::world::{Due, World, digest};

/// The source's ends of a set of data streams, and the link.
#[derive(Debug)]
pub(super) struct Streams {
    /// Its number in this world; sets of other attempts have others.
    session: u32,
    senders: Vec<Sender>,
    /// When the link has sent what was put on it so far: all streams share it.
    link_free_at: Timestamp,
    /// When what was sent last on each stream arrives: what is lost is sent again, and what is behind it waits.
    arrives_at: Vec<Timestamp>,
    /// Ends of the round under way, stream by stream.
    ended: Vec<RoundSent>,
    /// Whether the digest of all of memory is wanted with the round.
    whole: bool,
}

impl World {
    pub(super) fn perform_source(&mut self, action: Action) {
        self.trace(|| format!("source [{}]: {}", self.source.phase(), brief(&action)));
        match action {
            Action::Connect { delay } => self.connect(delay),
            Action::Send(message) => self.send(To::Target, &message),
            Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::SendMemory(_) => unreachable!("the two hosts of this world share no memory"),
            Action::OpenStreams { .. } => {
                self.kept_senders.clear();
                self.open_streams(0);
            }
            Action::ReopenStreams { session, lacking, verify } => {
                assert!(
                    verify && session > 0 && self.streams.is_none(),
                    "closed before they are opened anew"
                );
                if self.injection.keeps_known(lacking.count()) {
                    self.trace(|| "!! what the target lacks still counts as known".to_owned());
                } else {
                    self.kept_senders.iter_mut().for_each(|sender| sender.forget(&lacking));
                }
                self.report.reconnections += 1;
                self.open_streams(session);
            }
            Action::CloseStreams => {
                self.streams_at_source = None;
                if let Some(streams) = self.streams.take() {
                    self.kept_senders = streams.senders;
                    let session = streams.session;
                    self.after(self.scenario.link.latency, Due::EndOfStreams(session));
                }
            }
            Action::SendPages { pages, fence, paused, first, whole } => {
                self.send_pages(&pages, (fence, first), paused, whole);
            }
            Action::ReadDirtyLog => {
                self.queue_source_job(action);
                self.logs_read += 1;
                self.strike(When::ReadingLog(self.logs_read));
            }
            Action::StartDirtyLog
            | Action::StopDirtyLog
            | Action::PauseVm
            | Action::SaveState
            | Action::ResumeVm
            | Action::ReleaseVm
            | Action::WriteRecord(_)
            | Action::RehearseRecord(_) => self.queue_source_job(action),
            Action::Report(progress) => {
                self.report.doubted |= matches!(progress, Progress::InDoubt { .. });
                if let Progress::RoundDone(round) = progress {
                    self.report.sent_pages += round.sent.pages();
                }
            }
            Action::Finish(outcome) => self.source_ended(&outcome),
        }
    }

    /// Jobs on the VM and its record are done one after another.
    fn queue_source_job(&mut self, action: Action) {
        let us =
            if matches!(action, Action::WriteRecord(_) | Action::RehearseRecord(_)) { 1_500 } else { 150 };
        let done_at = self.source_free_at.max(self.now) + self.about_us(us);
        self.source_free_at = done_at;
        self.at(done_at, Due::SourceJob(self.attempt, action));
    }

    pub(super) fn source_job(&mut self, attempt: u32, action: Action) {
        let took = Duration::from_micros(150);
        let now = self.now;
        let event = match action {
            Action::WriteRecord(record) => match self.source_disk.write(&record) {
                Ok(()) => Some(Event::RecordWritten { took }),
                Err(reason) => Some(Event::RecordFailed(reason)),
            },
            Action::RehearseRecord(record) => match self.source_disk.write(&record) {
                Ok(()) => Some(Event::RecordRehearsed { took }),
                Err(reason) => Some(Event::RehearsalFailed(reason)),
            },
            Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::ReleaseVm => {
                let guest = self.source_guest.take().expect("released once");
                assert!(!guest.runs(), "a running guest is not released");
                self.report.written_pages = guest.written;
                None
            }
            Action::StartDirtyLog => {
                self.guest().set_logging(true);
                Some(Event::DirtyLogStarted)
            }
            Action::ReadDirtyLog => {
                assert!(self.guest().logging(), "the log is on");
                let round = Round { paused: !self.guest().runs(), ..self.round };
                let (kvm, devices) = self.guest().take_logs();
                let pages = self.injection.dirty_log(round, kvm, &devices);
                Some(Event::DirtyLogRead { pages, took })
            }
            Action::StopDirtyLog => {
                self.guest().set_logging(false);
                None
            }
            Action::PauseVm => {
                self.guest().set_runs(false, now);
                Some(Event::Paused)
            }
            Action::SaveState => {
                assert!(!self.guest().runs(), "the state is that of a paused guest");
                Some(Event::StateSaved {
                    state: vec![5],
                    network: NetworkIdentity::default(),
                    runs: true,
                    took,
                })
            }
            Action::ResumeVm => {
                self.guest().set_runs(true, now);
                Some(Event::VmResumed)
            }
            Action::Connect { .. }
            | Action::Send(_)
            | Action::SendMemory(_)
            | Action::OpenStreams { .. }
            | Action::CloseStreams
            | Action::ReopenStreams { .. }
            | Action::SendPages { .. }
            | Action::Report(_)
            | Action::Finish(_) => unreachable!("no job on the VM"),
        };
        if let Some(event) = event.filter(|_| attempt == self.attempt) {
            self.tell_source(event);
        }
    }

    fn guest(&mut self) -> &mut Guest {
        self.source_guest.as_mut().expect("the source has its guest until it is released")
    }

    /// Opens the set of streams that has `join` in each stream's join.
    fn open_streams(&mut self, join: u32) {
        self.sessions += 1;
        let (session, streams) = (self.sessions, self.scenario.streams);
        let indices = (0..streams).map(|index| StreamIndex::new(index, streams).expect("below their count"));
        let mut senders = std::mem::take(&mut self.kept_senders);
        if senders.is_empty() {
            senders = indices.map(|index| Sender::new(index, streams, self.scenario.compression)).collect();
        }
        senders.iter_mut().for_each(Sender::reopen);
        self.streams_at_source = Some(session);
        self.streams = Some(Streams {
            session,
            senders,
            link_free_at: self.now,
            arrives_at: vec![self.now; usize::from(streams)],
            ended: Vec::new(),
            whole: false,
        });
        let latency = self.scenario.link.latency;
        self.through_link(2 * latency, Due::Join(session, join));
    }

    /// The streams of set `session` knock at the target.
    pub(super) fn join(&mut self, session: u32, join: u32) {
        if self.streams.as_ref().is_none_or(|streams| streams.session != session) {
            return;
        }
        if self.let_in(session, join) {
            self.after(Duration::ZERO, Due::Stream(session, Event::StreamsOpened));
        } else {
            self.break_streams();
        }
    }

    fn send_pages(&mut self, pages: &PageBitmap, (fence, first): (u32, bool), paused: bool, whole: bool) {
        assert_eq!(paused, !self.guest().runs(), "the cap is lifted while the guest stands still");
        self.round = Round { fence, paused };
        let Some(streams) = &mut self.streams else { return };
        streams.ended.clear();
        streams.whole = whole;
        let session = streams.session;
        for sender in &mut streams.senders {
            sender.begin(pages, fence, first);
        }
        for index in 0..self.scenario.streams {
            let stream = StreamIndex::new(index, self.scenario.streams).expect("below their count");
            self.after(Duration::ZERO, Due::Look(session, stream));
        }
    }

    /// A sender looks at its next pages. Until it writes them the guest may write them too.
    pub(super) fn look(&mut self, session: u32, stream: StreamIndex) {
        let Self { streams: Some(streams), source_guest: Some(guest), .. } = self else { return };
        if streams.session != session {
            return;
        }
        streams.senders[usize::from(stream.number())].look(&guest.memory);
        let took = self.about_us(30);
        self.after(took, Due::Write(session, stream));
    }

    pub(super) fn write(&mut self, session: u32, stream: StreamIndex) {
        let (now, link) = (self.now, self.scenario.link);
        let lost = self.random.percent(link.loss_percent);
        let Self { streams: Some(streams), source_guest: Some(guest), .. } = self else { return };
        if streams.session != session {
            return;
        }
        let index = usize::from(stream.number());
        let Written { bytes, sent } = streams.senders[index].write(&guest.memory);
        let nanos = u64::try_from(bytes.len()).expect("usize fits u64") * 1_000_000_000 / link.bytes_per_s;
        let gone_at = streams.link_free_at.max(now) + Duration::from_nanos(nanos);
        streams.link_free_at = gone_at;
        let again = if lost { RETRANSMISSION } else { Duration::ZERO };
        let arrives_at =
            streams.arrives_at[index].max(gone_at + link.latency + again).max(self.partition_until[0]);
        streams.arrives_at[index] = arrives_at;
        let senders = streams.senders.len();
        let mut round = None;
        if let Some(sent) = sent {
            streams.ended.push(sent);
            if streams.ended.len() == senders {
                round = streams.ended.iter().copied().reduce(add);
                if let Some(round) = round.as_mut().filter(|_| streams.whole) {
                    round.whole_digest = Some(digest(&guest.memory));
                }
            }
        } else {
            self.at(gone_at, Due::Look(session, stream));
        }
        if !bytes.is_empty() {
            self.at(arrives_at, Due::Frame(session, stream, bytes));
        }
        if let Some(sent) = round {
            self.at(gone_at, Due::Stream(session, Event::RoundSent(sent)));
        }
    }

    /// All data streams break, at both ends.
    pub(super) fn break_streams(&mut self) {
        if let Some(streams) = self.streams.take() {
            self.kept_senders = streams.senders;
            let session = streams.session;
            self.after(
                Duration::ZERO,
                Due::Stream(session, Event::StreamFailed("connection reset".to_owned())),
            );
            self.after(Duration::ZERO, Due::EndOfStreams(session));
        }
    }
}

/// How long TCP takes at first to send again what was lost.
pub(super) const RETRANSMISSION: Duration = Duration::from_millis(200);

fn add(a: RoundSent, b: RoundSent) -> RoundSent {
    RoundSent {
        raw_pages: a.raw_pages + b.raw_pages,
        zero_pages: a.zero_pages + b.zero_pages,
        packed_pages: a.packed_pages + b.packed_pages,
        delta_pages: a.delta_pages + b.delta_pages,
        unchanged_pages: a.unchanged_pages + b.unchanged_pages,
        untouched_pages: a.untouched_pages + b.untouched_pages,
        wire_bytes: a.wire_bytes + b.wire_bytes,
        link_idle: Duration::ZERO,
        digest: a.digest.combine(b.digest),
        whole_digest: None,
    }
}

/// An action for the trace: bitmaps are long.
fn brief(action: &Action) -> String {
    match action {
        Action::SendPages { pages, fence, paused, first, whole } => {
            let pages = pages.count();
            format!("SendPages {pages} pages, fence {fence}, paused {paused}, first {first}, whole {whole}")
        }
        Action::ReopenStreams { session, lacking, .. } => {
            format!("ReopenStreams {session}, {} pages lacking", lacking.count())
        }
        Action::Connect { .. }
        | Action::Send(_)
        | Action::SendMemory(_)
        | Action::OpenStreams { .. }
        | Action::CloseStreams
        | Action::StartDirtyLog
        | Action::ReadDirtyLog
        | Action::StopDirtyLog
        | Action::PauseVm
        | Action::SaveState
        | Action::ResumeVm
        | Action::ReleaseVm
        | Action::WriteRecord(_)
        | Action::RehearseRecord(_)
        | Action::AskWitness(_)
        | Action::Report(_)
        | Action::Finish(_) => format!("{action:?}"),
    }
}
