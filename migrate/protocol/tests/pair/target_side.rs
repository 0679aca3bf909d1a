//! What the target's host does for its core.

use std::time::Duration;

use ferry_protocol::PageBitmap;
use ferry_protocol::target::{Action, Event, Target};

use crate::world::{Due, Guest, PAGES, Pair, STREAMS, VM_WORK, digest, layout};

impl Pair {
    pub(crate) fn perform_target(&mut self, action: Action) {
        match action {
            Action::ProbeWitness | Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::Send(message) => self.deliver_to_source(message),
            Action::WriteRecord(record) => {
                let took = self.target_disk.next_took();
                let event = match self.target_disk.write(record) {
                    Ok(()) => Event::RecordWritten { took },
                    Err(reason) => Event::RecordFailed(reason),
                };
                self.after(took, Due::Target(event));
            }
            Action::RehearseRecord(record) => {
                let took = self.target_disk.next_took();
                let event = match self.target_disk.rehearse(record) {
                    Ok(()) => Event::RecordRehearsed { took },
                    Err(reason) => Event::RehearsalFailed(reason),
                };
                self.after(took, Due::Target(event));
            }
            Action::BuildMachine { description, layout: built, streams, verify } => {
                self.streams_verify = (self.streams_verify.0, verify);
                assert_eq!((description, built, streams), (vec![1, 2, 3], layout(), STREAMS));
                self.build(false);
            }
            Action::AdoptMemory { description, layout: built } => {
                assert_eq!((description, built), (vec![1, 2, 3], layout()));
                self.build(true);
            }
            Action::EndStreams => self.end_streams_at_target(),
            Action::ExpectStreams { session, digest: _ } => {
                assert!(session > 0);
                self.round = PageBitmap::empty(PAGES);
            }
            Action::HangUp => self.cut_control(Duration::ZERO),
            Action::DropStaleFrames => assert!(self.target_guest.exists),
            Action::RestoreState(state) => {
                assert_eq!(state, [5]);
                self.restores += 1;
                self.after(VM_WORK, Due::Target(Event::StateRestored { took: VM_WORK }));
            }
            Action::RunVm { runs } => {
                assert!(self.target.as_ref().is_some_and(Target::may_run), "the rules allow it");
                let expected = Some(("running", self.target_disk.record.as_ref().unwrap().epoch.number()));
                assert_eq!(self.target_disk.standing(), expected, "only what is recorded runs");
                self.target_guest.runs = runs;
                self.adopted = false;
                self.after(VM_WORK, Due::Target(Event::VmRunning { took: VM_WORK }));
            }
            Action::Announce(_) => assert!(self.target_guest.runs, "only a running guest is announced"),
            Action::DiscardMachine => {
                assert!(!self.target_guest.runs, "a running guest is never discarded");
                self.target_guest = Guest::default();
                self.adopted = false;
            }
            Action::Report(progress) => self.target_progress.push(progress),
            Action::Finish(outcome) => {
                self.target_outcomes.push(outcome);
                self.target = None;
                self.queue.retain(|_, due| !matches!(due, Due::Target(_)));
                if self.waiting.is_none() {
                    self.close();
                }
            }
        }
    }

    fn build(&mut self, adopted: bool) {
        let event = match self.build_refusal {
            None => Event::MachineBuilt,
            Some((code, text)) => Event::BuildFailed { code, sentence: text.to_owned() },
        };
        self.target_guest.exists = self.build_refusal.is_none();
        self.adopted = adopted && self.target_guest.exists;
        self.after(VM_WORK, Due::Target(event));
    }

    /// What was under way is lost, but for the lower half of the round.
    fn end_streams_at_target(&mut self) {
        self.end_streams();
        let mut arrived = PageBitmap::empty(PAGES);
        let count = usize::try_from(self.round.count() / 2).unwrap();
        let pages = self.round.ranges().flat_map(|range| range.first()..range.first() + range.count());
        pages.take(count).for_each(|page| arrived.insert(page));
        let ended = Event::StreamsEnded { arrived, digest: digest(7) };
        self.after(VM_WORK, Due::Target(ended));
    }
}
