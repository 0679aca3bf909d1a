//! What the target's host does for its core.

use std::time::Duration;

use ferry_protocol::Message;
use ferry_protocol::message::AbortCode;
use ferry_protocol::target::{Action, Event, Outcome, Target};

use super::control::To;
use super::guest::Guest;
use super::incoming::Incoming;
use super::memory::Memory;
use super::world::{Due, World};

impl World {
    pub(super) fn perform_target(&mut self, action: Action) {
        self.trace(|| format!("target [{}]: {action:?}", self.target.as_ref().map_or("none", Target::phase)));
        match action {
            Action::Send(message) => {
                match &message {
                    Message::Prepared(_) => self.judge(true),
                    Message::Abort(abort) if abort.code == AbortCode::DigestDiffers => self.judge(false),
                    Message::Abort(_)
                    | Message::Hello(_)
                    | Message::Welcome(_)
                    | Message::Describe(_)
                    | Message::HandOver(_)
                    | Message::Ready(_)
                    | Message::FenceReached(_)
                    | Message::Stopping(_)
                    | Message::State(_)
                    | Message::Prepare(_)
                    | Message::Commit(_)
                    | Message::Running(_)
                    | Message::Discarded(_)
                    | Message::Released(_)
                    | Message::Ping(_)
                    | Message::Pong(_)
                    | Message::Rehearse(_)
                    | Message::Rehearsed(_)
                    | Message::Witness(_)
                    | Message::KeepFor(_)
                    | Message::Resume(_)
                    | Message::Arrived(_)
                    | Message::Admit(_) => {}
                }
                self.send(To::Source, &message);
            }
            Action::ProbeWitness | Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::WriteRecord(_)
            | Action::RehearseRecord(_)
            | Action::BuildMachine { .. }
            | Action::AdoptMemory { .. }
            | Action::RestoreState(_)
            | Action::RunVm { .. }
            | Action::DiscardMachine => self.queue_target_job(action),
            Action::EndStreams => {
                self.end_streams_at_target();
                self.queue_target_job(action);
            }
            Action::ExpectStreams { session, digest } => self.expect_streams(session, digest),
            Action::HangUp => {
                self.close(To::Source);
                self.control.targets = None;
            }
            Action::DropStaleFrames => assert!(self.target_memory.is_some(), "a machine has a tap"),
            Action::Announce(_) => {
                assert!(
                    self.target_guest.as_ref().is_some_and(Guest::runs),
                    "only a guest that runs is announced"
                );
            }
            Action::Report(_) => {}
            Action::Finish(outcome) => {
                let runs = self.target_guest.is_some();
                assert!(!matches!(outcome, Outcome::Running { .. }) || runs, "{outcome:?}");
                self.end_target_process();
                self.close(To::Source);
            }
        }
    }

    /// Jobs on the machine and its record are done one after another.
    fn queue_target_job(&mut self, action: Action) {
        let us =
            if matches!(action, Action::WriteRecord(_) | Action::RehearseRecord(_)) { 1_500 } else { 200 };
        let done_at = self.target_free_at.max(self.now) + self.about_us(us);
        self.target_free_at = done_at;
        self.at(done_at, Due::TargetJob(self.process, action));
    }

    pub(super) fn target_job(&mut self, action: Action) {
        let took = Duration::from_micros(200);
        let event = match action {
            Action::WriteRecord(record) => match self.target_disk.write(&record) {
                Ok(()) => Event::RecordWritten { took },
                Err(reason) => Event::RecordFailed(reason),
            },
            Action::RehearseRecord(record) => match self.target_disk.write(&record) {
                Ok(()) => Event::RecordRehearsed { took },
                Err(reason) => Event::RehearsalFailed(reason),
            },
            Action::BuildMachine { description, layout, streams, verify } => {
                assert!(verify, "nobody asked to do without");
                assert_eq!((description, streams), (vec![1, 2, 3], self.scenario.streams));
                if self.target_refuses {
                    let sentence = "it has too little memory".to_owned();
                    Event::BuildFailed { code: AbortCode::NoMemory, sentence }
                } else {
                    self.target_memory = Some(Memory::empty(&layout));
                    self.incoming = Some(Incoming::new(streams));
                    Event::MachineBuilt
                }
            }
            Action::ProbeWitness | Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::AdoptMemory { .. } => unreachable!("the two hosts of this world share no memory"),
            Action::RestoreState(state) => {
                assert_eq!(state, [5]);
                Event::StateRestored { took }
            }
            Action::RunVm { runs } => {
                self.judge_run();
                assert!(self.target.as_ref().is_some_and(Target::may_run), "the rules allow it");
                self.incoming = None;
                let memory = self.target_memory.take().expect("a guest has memory");
                let mut guest = Guest::with_memory(memory, &self.scenario.work, self.random.fork());
                guest.set_runs(runs, self.now);
                self.target_guest = Some(guest);
                Event::VmRunning { took }
            }
            Action::EndStreams => {
                let (arrived, digest) = self.arrived();
                Event::StreamsEnded { arrived, digest }
            }
            Action::DiscardMachine => {
                self.end_streams_at_target();
                self.incoming = None;
                self.target_memory = None;
                return;
            }
            Action::Send(_)
            | Action::DropStaleFrames
            | Action::ExpectStreams { .. }
            | Action::HangUp
            | Action::Announce(_)
            | Action::Report(_)
            | Action::Finish(_) => unreachable!("no job on the machine"),
        };
        self.tell_target(event);
    }

    /// The process of the attempt is over; what it still had to do is not done any more.
    pub(super) fn end_target_process(&mut self) {
        self.target = None;
        self.process += 1;
        self.target_free_at = self.now;
    }
}
