//! The world that is searched: two hosts, what each has on disk and in memory, and the connections between them.
//!
//! ```text
//!  host 0                                   host 1
//!   disk: Record                             disk: Record
//!   process                                  process
//!     guest?   runs or not                     receiver: Target core, jobs, inbox
//!     Source core, jobs, inbox  --- Link ---   guest?
//! ```
//!
//! Jobs are what a core has asked to be done on the VM or its record; the inbox is what was done and the core has not
//! heard of yet. So a crash can come before a record is durable, after it is, and after the core knows.

use std::collections::VecDeque;
use std::sync::Arc;

use ferry_protocol::record::{Record, Standing};
use ferry_protocol::source::{self, Source};
use ferry_protocol::target::{self, Target};
use ferry_protocol::witness::{Claim, Entry, Ruling, Verdict, WitnessId, judge};
use ferry_protocol::{Epoch, Message, MigrationId, VmId, VmName};

use crate::keyed::Keyed;
use crate::settings::Settings;
use crate::streams::{DataLink, Received, Senders, Version};

/// Which of the two.
pub(crate) type HostIndex = usize;

pub(crate) const VM: VmId = VmId([1; 16]);

pub(crate) const WITNESS: WitnessId = WitnessId([3; 16]);

/// More connections than this wait to be looked at at no time.
const LINKS_MAX: usize = 2;

pub(crate) fn vm_name() -> VmName {
    "web".parse().expect("a constant name")
}

/// A guest's memory and machine on a host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Guest {
    pub(crate) epoch: Epoch,
    pub(crate) arrived_by: Option<MigrationId>,
    pub(crate) runs: bool,
    /// Which life of the guest this copy holds: it grows whenever a copy begins to run somewhere else.
    pub(crate) life: u8,
    /// What its memory holds.
    pub(crate) memory: Version,
    /// Of when the rest of its state is: after how many pauses.
    pub(crate) state: Version,
    /// Whether memory was written since the dirty log was read, while that is on.
    pub(crate) log: Option<bool>,
}

/// What a core has asked the witness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Question {
    /// Whether it is there.
    Probe,
    /// A claim.
    Claim(Claim),
}

/// The witness.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Witness {
    pub(crate) entry: Option<Entry>,
    /// Which hosts reach it.
    pub(crate) reached_by: [bool; 2],
}

impl Witness {
    /// Whether it says that `migration` has brought the VM to its target.
    pub(crate) fn says_it_runs(&self, migration: MigrationId) -> bool {
        self.entry.is_some_and(|entry| entry.migration == migration && entry.verdict != Verdict::Discarded)
    }

    /// Hears a question that reaches it; `None` for a probe.
    pub(crate) fn hear(&mut self, question: Question) -> Option<Ruling> {
        let Question::Claim(claim) = question else { return None };
        let judgement = judge(&claim, self.entry.as_ref()).expect("an epoch is given away once");
        self.entry = judgement.entry.or(self.entry);
        Some(judgement.ruling)
    }
}

/// A migration away.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Sending {
    pub(crate) core: Keyed<Source>,
    pub(crate) migration: MigrationId,
    pub(crate) senders: Senders,
    pub(crate) jobs: VecDeque<Keyed<source::Action>>,
    pub(crate) inbox: VecDeque<Keyed<source::Event>>,
    /// The connection in use.
    pub(crate) link: Option<u8>,
    pub(crate) connecting: bool,
    /// What it has asked the witness.
    pub(crate) asked: Option<Question>,
    /// What the witness has said, or that it says nothing.
    pub(crate) answer: Option<Keyed<source::Event>>,
    /// How it ended, once it has; what is queued is still done.
    pub(crate) outcome: Option<Keyed<source::Outcome>>,
}

/// A migration that is taken in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Receiving {
    pub(crate) core: Keyed<Target>,
    pub(crate) migration: MigrationId,
    pub(crate) jobs: VecDeque<Keyed<target::Action>>,
    pub(crate) inbox: VecDeque<Keyed<target::Event>>,
    pub(crate) link: Option<u8>,
    /// The connection of the next attempt, which waits until this one is over.
    pub(crate) newer: Option<u8>,
    /// Whether there is a machine with the memory that arrived.
    pub(crate) machine: bool,
    pub(crate) streams: Received,
    /// What it has asked the witness.
    pub(crate) asked: Option<Question>,
    /// What the witness has said, or that it says nothing.
    pub(crate) answer: Option<Keyed<target::Event>>,
    /// How it ended, once it has; what is queued is still done.
    pub(crate) outcome: Option<Keyed<target::Outcome>>,
}

/// A ferry process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Process {
    /// Whether a receiver listens.
    pub(crate) listens: bool,
    /// Whether its operator wants it to stop waiting.
    pub(crate) stopping: bool,
    pub(crate) receiving: Option<Receiving>,
    pub(crate) guest: Option<Guest>,
    pub(crate) sending: Option<Sending>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Host {
    pub(crate) disk: Option<Keyed<Record>>,
    pub(crate) process: Option<Process>,
}

/// A control connection as both ends see it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Link {
    pub(crate) number: u8,
    /// The host that made it.
    pub(crate) from: HostIndex,
    pub(crate) to_target: VecDeque<Keyed<Message>>,
    pub(crate) to_source: VecDeque<Keyed<Message>>,
    /// Whether the source still uses it.
    pub(crate) at_source: bool,
    /// Whether the target does, or may yet.
    pub(crate) at_target: bool,
    /// Whether the target has read its `Hello`.
    pub(crate) greeted: bool,
    /// It is broken: what is under way may or may not arrive.
    pub(crate) cut: bool,
}

/// All there is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) hosts: [Arc<Host>; 2],
    pub(crate) links: Vec<Link>,
    /// The data streams' connections.
    pub(crate) data: Vec<DataLink>,
    pub(crate) witness: Witness,
    /// How many more migrations may be begun.
    pub(crate) attempts_left: u8,
    /// How many more things may go wrong.
    pub(crate) faults_left: u8,
    /// How often the guest may still write its memory.
    pub(crate) writes_left: u8,
    /// What it has written last.
    pub(crate) written: Version,
    /// The newest state of the guest.
    pub(crate) state: Version,
    /// A side has found fault with what the other sent, or the two memories to differ.
    pub(crate) blamed: bool,
    /// The newest life of the guest.
    pub(crate) life: u8,
    /// The host that owned the VM was lost with it.
    pub(crate) owner_lost: bool,
}

impl World {
    /// The VM runs on host 0, and host 1 waits for it.
    pub(crate) fn new(settings: &Settings, reached_by: [bool; 2]) -> Self {
        let record = Record::of_own(VM, vm_name(), Epoch::FIRST, Standing::Running);
        // Only pages that travel need contents that can be told apart from none.
        let written = u8::from(settings.streams);
        let guest = Guest {
            epoch: Epoch::FIRST,
            arrived_by: None,
            runs: true,
            life: 0,
            memory: written,
            state: written,
            log: None,
        };
        let owner = Process { guest: Some(guest), ..Process::default() };
        let waiting = Process { listens: true, ..Process::default() };
        Self {
            hosts: [
                Arc::new(Host { disk: Some(Keyed::new(record)), process: Some(owner) }),
                Arc::new(Host { disk: None, process: Some(waiting) }),
            ],
            links: Vec::new(),
            data: Vec::new(),
            witness: Witness { entry: None, reached_by },
            attempts_left: settings.attempts,
            faults_left: settings.faults,
            writes_left: settings.writes,
            written,
            state: written,
            blamed: false,
            life: 0,
            owner_lost: false,
        }
    }

    pub(crate) fn host_mut(&mut self, host: HostIndex) -> &mut Host {
        Arc::make_mut(&mut self.hosts[host])
    }

    pub(crate) fn process(&self, host: HostIndex) -> Option<&Process> {
        self.hosts[host].process.as_ref()
    }

    pub(crate) fn process_mut(&mut self, host: HostIndex) -> Option<&mut Process> {
        self.host_mut(host).process.as_mut()
    }

    pub(crate) fn sending(&self, host: HostIndex) -> Option<&Sending> {
        self.process(host)?.sending.as_ref()
    }

    pub(crate) fn sending_mut(&mut self, host: HostIndex) -> Option<&mut Sending> {
        self.process_mut(host)?.sending.as_mut()
    }

    pub(crate) fn receiving(&self, host: HostIndex) -> Option<&Receiving> {
        self.process(host)?.receiving.as_ref()
    }

    pub(crate) fn receiving_mut(&mut self, host: HostIndex) -> Option<&mut Receiving> {
        self.process_mut(host)?.receiving.as_mut()
    }

    pub(crate) fn guest(&self, host: HostIndex) -> Option<&Guest> {
        self.process(host)?.guest.as_ref()
    }

    pub(crate) fn link(&self, number: u8) -> Option<&Link> {
        self.links.iter().find(|link| link.number == number)
    }

    pub(crate) fn link_mut(&mut self, number: u8) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.number == number)
    }

    /// Whether a source that wants to connect can at this moment, or has to wait until an older connection is done with.
    pub(crate) fn has_room_for_link(&self) -> bool {
        self.links.len() < LINKS_MAX
    }

    /// Forgets connections that neither end uses, and numbers are taken anew, so that worlds that differ only in
    /// their history are one.
    pub(crate) fn tidy(&mut self) {
        self.links.retain(|link| link.at_source || link.at_target);
        self.tidy_streams();
        for link in &mut self.links {
            if !link.at_target {
                link.to_target.clear();
            }
            if !link.at_source {
                link.to_source.clear();
            }
        }
        for host in 0..2 {
            let ended = self.process(host).is_some_and(Process::is_over);
            if ended {
                self.end_process(host);
            }
        }
    }

    /// Ends `host`'s process in good order: what it has written to its connections still arrives.
    pub(crate) fn end_process(&mut self, host: HostIndex) {
        self.host_mut(host).process = None;
        for link in &mut self.links {
            *(if link.from == host { &mut link.at_source } else { &mut link.at_target }) = false;
        }
        for link in &mut self.data {
            *(if link.from == host { &mut link.at_source } else { &mut link.at_target }) = false;
        }
        self.links.retain(|link| link.at_source || link.at_target);
    }

    /// Kills `host`'s process; its connections break.
    pub(crate) fn crash(&mut self, host: HostIndex) {
        self.end_process(host);
        self.links.iter_mut().for_each(|link| link.cut = true);
        self.data.iter_mut().for_each(|link| link.cut = true);
    }
}

impl Process {
    /// Whether nothing is left for it to do.
    fn is_over(&self) -> bool {
        let waits = self.listens && !self.stopping;
        !waits && self.receiving.is_none() && self.guest.is_none() && self.sending.is_none()
    }
}
