//! What the source's host does for its core.

use std::time::Duration;

use ferry_protocol::message::{AbortCode, NetworkIdentity};
use ferry_protocol::source::{Action, Event, Progress, RoundSent};
use ferry_protocol::{PageBitmap, StreamIndex, Timestamp, target};

use super::control::To;
use super::fault::Round;
use super::guest::Guest;
use super::stream::{Receiver, Sender, Written};
use super::world::{Due, World};

/// The data streams of one attempt, both ends and the link between them.
#[derive(Debug)]
pub(super) struct Streams {
    session: u32,
    senders: Vec<Sender>,
    receivers: Vec<Receiver>,
    /// When the link has sent what was put on it so far: all streams share it.
    link_free_at: Timestamp,
    /// Ends of the round under way, stream by stream.
    ended: Vec<RoundSent>,
}

impl World {
    pub(super) fn perform_source(&mut self, action: Action) {
        self.trace(|| format!("source [{}]: {}", self.source.phase(), brief(&action)));
        match action {
            Action::Connect { delay } => self.connect(delay),
            Action::Send(message) => self.send(To::Target, &message),
            Action::SendMemory(_) => unreachable!("the two hosts of this world share no memory"),
            Action::OpenStreams { .. } => self.open_streams(),
            Action::CloseStreams => {
                if self.streams.take().is_some() {
                    self.break_at_target(self.scenario.link.latency);
                }
            }
            Action::SendPages { pages, fence, paused } => self.send_pages(&pages, fence, paused),
            Action::StartDirtyLog
            | Action::ReadDirtyLog
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

    fn open_streams(&mut self) {
        self.sessions += 1;
        let streams = self.scenario.streams;
        let indices = (0..streams).map(|index| StreamIndex::new(index, streams).expect("below their count"));
        self.streams = Some(Streams {
            session: self.sessions,
            senders: indices
                .clone()
                .map(|index| Sender::new(index, streams, self.scenario.compression))
                .collect(),
            receivers: indices.map(|_| Receiver::new()).collect(),
            link_free_at: self.now,
            ended: Vec::new(),
        });
        self.after(2 * self.scenario.link.latency, Due::Source(self.attempt, Event::StreamsOpened));
    }

    fn send_pages(&mut self, pages: &PageBitmap, fence: u32, paused: bool) {
        assert_eq!(paused, !self.guest().runs(), "the cap is lifted while the guest stands still");
        self.round = Round { fence, paused };
        let Some(streams) = &mut self.streams else { return };
        streams.ended.clear();
        let session = streams.session;
        for sender in &mut streams.senders {
            sender.begin(pages, fence);
        }
        for index in 0..self.scenario.streams {
            let stream = StreamIndex::new(index, self.scenario.streams).expect("below their count");
            self.after(Duration::ZERO, Due::Look(session, stream));
        }
    }

    fn streams(&mut self, session: u32) -> Option<&mut Streams> {
        self.streams.as_mut().filter(|streams| streams.session == session)
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
        let Self { streams: Some(streams), source_guest: Some(guest), .. } = self else { return };
        if streams.session != session {
            return;
        }
        let Written { bytes, sent } = streams.senders[usize::from(stream.number())].write(&guest.memory);
        let nanos = u64::try_from(bytes.len()).expect("usize fits u64") * 1_000_000_000 / link.bytes_per_s;
        let gone_at = streams.link_free_at.max(now) + Duration::from_nanos(nanos);
        streams.link_free_at = gone_at;
        let senders = streams.senders.len();
        let mut round = None;
        if let Some(sent) = sent {
            streams.ended.push(sent);
            if streams.ended.len() == senders {
                round = streams.ended.iter().copied().reduce(add);
            }
        } else {
            self.at(gone_at, Due::Look(session, stream));
        }
        if !bytes.is_empty() {
            self.at(gone_at + link.latency, Due::Frame(session, stream, bytes));
        }
        if let Some(sent) = round {
            self.at(gone_at, Due::Source(self.attempt, Event::RoundSent(sent)));
        }
    }

    /// A frame arrives at the target.
    pub(super) fn frame(&mut self, session: u32, stream: StreamIndex, bytes: &[u8]) {
        let round = self.round;
        let Self { streams: Some(streams), target_memory: Some(memory), injection, .. } = self else {
            return;
        };
        if streams.session != session {
            return;
        }
        let receiver = &mut streams.receivers[usize::from(stream.number())];
        let event = match receiver.receive(bytes, memory, round, injection) {
            Ok(None) => return,
            Ok(Some((fence, digest))) => target::Event::FenceReached { stream, fence, digest },
            Err(error) => {
                target::Event::StreamFailed { code: AbortCode::Protocol, sentence: error.to_string() }
            }
        };
        self.tell_target(event);
    }

    /// All data streams break.
    pub(super) fn cut_streams(&mut self) {
        if self.streams.take().is_some() {
            let failed = Event::StreamFailed("connection reset".to_owned());
            self.after(Duration::ZERO, Due::Source(self.attempt, failed));
            self.break_at_target(Duration::ZERO);
        }
    }

    fn break_at_target(&mut self, delay: Duration) {
        let (code, sentence) = (AbortCode::Internal, "connection reset".to_owned());
        self.after(delay, Due::Target(self.process, target::Event::StreamFailed { code, sentence }));
    }

    /// The target has closed its ends.
    pub(super) fn close_streams_at_target(&mut self) {
        let latency = self.scenario.link.latency;
        if let Some(streams) = &self.streams {
            let session = streams.session;
            if self.streams(session).is_some() {
                self.streams = None;
                let failed = Event::StreamFailed("connection reset".to_owned());
                self.after(latency, Due::Source(self.attempt, failed));
            }
        }
    }
}

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
    }
}

/// An action for the trace: bitmaps are long.
fn brief(action: &Action) -> String {
    match action {
        Action::SendPages { pages, fence, paused } => {
            format!("SendPages {} pages, fence {fence}, paused {paused}", pages.count())
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
        | Action::Report(_)
        | Action::Finish(_) => format!("{action:?}"),
    }
}
