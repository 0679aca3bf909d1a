//! What can happen next: the ordinary steps of hosts and connections, and as long as the bounds allow it whatever can
//! go wrong.

use std::time::Duration;

use ferry_protocol::record::{Record, Standing};
use ferry_protocol::{Timestamp, source, target};

use crate::keyed::Keyed;
use crate::settings::{Mistake, Settings};
use crate::world::{Guest, HostIndex, Process, Receiving, World};
use crate::{source_side, streams, target_side};

/// A source that is due within this only rests between two rounds.
const RESTS_MAX: Duration = Duration::from_millis(100);

/// The phases of a target that is to run the guest, can't, and may yet give it back.
const GIVING_BACK: [&str; 5] = [
    "waiting to start again",
    "giving the guest back",
    "waiting to record again",
    "recording that it does not run",
    "giving up at the witness",
];

/// One step of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A migration begins at this host.
    Migrate(usize),
    /// `ferry receive` is started on this host.
    Listen(usize),
    /// The VM is started anew on this host, whose record says that it owns it.
    Start(usize),
    /// The source's attempt to connect ends, well if anybody listens.
    Connect(usize),
    /// The next message of this connection reaches the source.
    ToSource(u8),
    /// The next message of this connection reaches the target.
    ToTarget(u8),
    /// The source notices that this connection is gone.
    LostAtSource(u8),
    /// The target does.
    LostAtTarget(u8),
    /// The first job that the source's core has asked for is done.
    SourceJob(usize),
    /// The target's.
    TargetJob(usize),
    /// The source's core hears of what was done.
    SourceHears(usize),
    /// The target's.
    TargetHears(usize),
    /// The witness hears the source, if it is reached.
    SourceAsks(usize),
    /// The witness hears the target, if it is reached.
    TargetAsks(usize),
    /// The source hears what the witness says.
    SourceTold(usize),
    /// The target does.
    TargetTold(usize),
    /// The operator, who knows, lets the source take the guest back (true), or let go of it.
    Resolve(usize, bool),
    /// What the source's core waits for takes too long.
    SourceTimeout(usize),
    /// What the target's core waits for.
    TargetTimeout(usize),
    /// The source's data stream is connected, if anybody listens.
    StreamOpens(usize),
    /// It sends the round that it was handed.
    StreamSends(usize),
    /// The next frame of this data connection reaches the target.
    FrameArrives(u8),
    /// The source notices that this data connection is gone.
    StreamLostAtSource(u8),
    /// The target does.
    StreamLostAtTarget(u8),
    /// The guest on this host writes its memory.
    GuestWrites(usize),
    /// The migration is over at the source, with all its jobs.
    SourceClose(usize),
    /// And at the target.
    TargetClose(usize),
    /// Something goes wrong.
    Fault(Fault),
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// It fails all the same.
    ConnectFails(usize),
    /// This connection breaks.
    Cut(u8),
    /// This data connection breaks.
    CutStream(u8),
    /// It fails.
    SourceJobFails(usize, bool),
    /// It fails; the flag says whether the record is on disk all the same.
    TargetJobFails(usize, bool),
    /// The same, but the answer is lost.
    SourceAnswerLost(usize),
    /// The same for the target.
    TargetAnswerLost(usize),
    /// The witness can be reached by this host from now on, or can't any more.
    Reach(usize),
    /// The target takes too long to answer a source that has reached it again.
    TooSlow(usize),
    /// The operator cancels the migration at the source.
    Cancel(usize),
    /// The operator stops `ferry receive`.
    StopWaiting(usize),
    /// The process on this host is killed.
    Crash(usize),
}

impl World {
    /// What can happen without anything going wrong.
    pub(crate) fn ordinary_steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for host in 0..2 {
            if let Some(process) = self.process(host) {
                process_steps(host, process, self.has_room_for_link(), &mut steps);
            }
        }
        for link in &self.links {
            let number = link.number;
            if link.at_source {
                if !link.to_source.is_empty() {
                    steps.push(Step::ToSource(number));
                }
                if link.cut || (!link.at_target && link.to_source.is_empty()) {
                    steps.push(Step::LostAtSource(number));
                }
            }
            if link.at_target {
                let free = link.greeted || self.takes_knocks(1 - link.from);
                if free && !link.to_target.is_empty() {
                    steps.push(Step::ToTarget(number));
                }
                if link.cut || (!link.at_source && link.to_target.is_empty()) {
                    steps.push(Step::LostAtTarget(number));
                }
            }
        }
        self.stream_steps(&mut steps);
        steps
    }

    /// The same, but before the commit a side that would only give up waits as long as anything else can happen: giving up has
    /// the consequences of a cancellation, which is a fault and may come at any time.
    pub(crate) fn patient_steps(&self) -> Vec<Step> {
        let mut steps = self.ordinary_steps();
        let is_timeout = |step: &Step| matches!(step, Step::SourceTimeout(_) | Step::TargetTimeout(_));
        if !steps.iter().all(is_timeout) {
            let source = |step: &Step| matches!(*step, Step::SourceTimeout(host) if self.gives_up(host));
            let target =
                |step: &Step| matches!(*step, Step::TargetTimeout(host) if self.gives_up_waiting(host));
            steps.retain(|step| !source(step) && !target(step));
        }
        steps
    }

    /// Whether the source on `host` would give up if its time was over.
    fn gives_up(&self, host: HostIndex) -> bool {
        let Some(core) = self.sending(host).map(|sending| &sending.core) else { return false };
        let rests = core.poll_timeout().is_some_and(|at| at <= Timestamp::from_origin(RESTS_MAX));
        let waits = [
            "connecting",
            "greeting",
            "describing",
            "opening streams",
            "pre-copy",
            "reconnecting",
            "stop-and-copy",
            "preparing",
        ];
        !rests && waits.contains(&core.phase())
    }

    /// Whether the target on `host` would give up if its time was over.
    fn gives_up_waiting(&self, host: HostIndex) -> bool {
        self.receiving(host).is_some_and(|receiving| {
            let late = receiving.core.poll_timeout() > Some(Timestamp::from_origin(source_side::RECONNECT));
            ["interrupted", "prepared"].contains(&receiving.core.phase()) && late
        })
    }

    /// Whether `host` looks at new connections now.
    fn takes_knocks(&self, host: HostIndex) -> bool {
        let Some(process) = self.process(host) else { return false };
        let closing = process.receiving.as_ref().is_some_and(|receiving| receiving.outcome.is_some());
        process.listens && !closing
    }

    /// What people may do, whatever else happens.
    pub(crate) fn peoples_steps(&self, settings: &Settings) -> Vec<Step> {
        let mut steps = Vec::new();
        for host in 0..2 {
            let migrating = self.sending(host).is_some();
            if self.attempts_left > 0 && self.guest(host).is_some() && !migrating {
                steps.push(Step::Migrate(host));
            }
            if self.may_write(host) {
                steps.push(Step::GuestWrites(host));
            }
            if let Some(resume) = self.resolution(host) {
                steps.push(Step::Resolve(host, resume));
            }
            if self.process(host).is_none() {
                steps.push(Step::Listen(host));
                if self.may_start(host, settings) {
                    steps.push(Step::Start(host));
                }
            }
        }
        steps
    }

    /// What an operator who knows both hosts may decide at the source on `host`: that it takes the guest back (true),
    /// if no process is left that could run it and no record says that it ran; that it lets go (false), if it runs at the
    /// target.
    fn resolution(&self, host: HostIndex) -> Option<bool> {
        let sending = self.sending(host)?;
        let other = &self.hosts[1 - host];
        if !sending.core.is_in_doubt() {
            return None;
        }
        if self.guest(1 - host).is_some_and(|guest| guest.runs) {
            return Some(false);
        }
        let ran = other.disk.as_ref().is_some_and(|record| record.standing == Standing::Running);
        (other.process.is_none() && !ran).then_some(true)
    }

    fn may_start(&self, host: HostIndex, settings: &Settings) -> bool {
        let Some(record) = &self.hosts[host].disk else { return false };
        match record.standing {
            Standing::Running | Standing::Stopped => true,
            Standing::Committed { .. } => settings.mistake == Some(Mistake::StartAgainstTheRecord),
            Standing::Released { .. } | Standing::Receiving { .. } | Standing::Discarded => false,
        }
    }

    /// What may go wrong, if anything may.
    pub(crate) fn faults(&self, settings: &Settings) -> Vec<Fault> {
        let mut steps = Vec::new();
        if self.faults_left == 0 {
            return steps;
        }
        for host in 0..2 {
            let Some(process) = self.process(host) else { continue };
            steps.push(Fault::Crash(host));
            if process.listens && !process.stopping {
                steps.push(Fault::StopWaiting(host));
            }
            if let Some(sending) = process.sending.as_ref().filter(|sending| sending.outcome.is_none()) {
                steps.push(Fault::Cancel(host));
                if sending.connecting {
                    steps.push(Fault::ConnectFails(host));
                }
                let at_last = Some(Timestamp::from_origin(source_side::RECONNECT));
                if sending.core.phase() == "reconnecting" && sending.core.poll_timeout() < at_last {
                    steps.push(Fault::TooSlow(host));
                }
                if sending.asked.is_some() && self.witness.reached_by[host] {
                    steps.push(Fault::SourceAnswerLost(host));
                }
                if let Some(source::Action::WriteRecord(_)) = sending.jobs.front().map(|job| &**job) {
                    steps.push(Fault::SourceJobFails(host, false));
                    steps.push(Fault::SourceJobFails(host, true));
                }
            }
            let asked = process.receiving.as_ref().is_some_and(|receiving| receiving.asked.is_some());
            if asked && self.witness.reached_by[host] {
                steps.push(Fault::TargetAnswerLost(host));
            }
            match process.receiving.as_ref().and_then(|receiving| receiving.jobs.front()).map(|job| &**job) {
                Some(target::Action::WriteRecord(_)) => {
                    steps.push(Fault::TargetJobFails(host, false));
                    steps.push(Fault::TargetJobFails(host, true));
                }
                Some(target::Action::RunVm { .. } | target::Action::RestoreState(_)) => {
                    steps.push(Fault::TargetJobFails(host, false));
                }
                Some(_) | None => {}
            }
        }
        if settings.witness {
            steps.extend([Fault::Reach(0), Fault::Reach(1)]);
        }
        steps.extend(self.links.iter().filter(|link| !link.cut).map(|link| Fault::Cut(link.number)));
        steps.extend(self.data.iter().filter(|link| !link.cut).map(|link| Fault::CutStream(link.number)));
        steps
    }

    /// The world after `step`.
    pub(crate) fn after(&self, step: Step, settings: &Settings) -> Self {
        let mut world = self.clone();
        world.take(step, settings);
        world.tidy();
        world
    }

    fn take(&mut self, step: Step, settings: &Settings) {
        let now = Timestamp::default();
        match step {
            Step::Migrate(host) => source_side::begin(self, host, settings),
            Step::Listen(host) => {
                self.host_mut(host).process = Some(Process { listens: true, ..Process::default() });
            }
            Step::Start(host) => self.start(host),
            Step::Connect(host) => source_side::connected(self, host, settings),
            Step::ToSource(number) => self.reach_source(number, settings),
            Step::ToTarget(number) => {
                if let Some(link) = self.link(number) {
                    target_side::deliver(self, 1 - link.from, number, settings);
                }
            }
            Step::LostAtSource(number) => self.lost_at_source(number, settings),
            Step::LostAtTarget(number) => self.lost_at_target(number, settings),
            Step::SourceJob(host) => source_side::do_job(self, host, settings),
            Step::TargetJob(host) => target_side::do_job(self, host, settings),
            Step::SourceHears(host) => source_side::hears(self, host, settings),
            Step::TargetHears(host) => target_side::hears(self, host, settings),
            Step::SourceTimeout(host) => source_side::timeout(self, host, settings),
            Step::TargetTimeout(host) => target_side::timeout(self, host, settings),
            Step::StreamOpens(host) => streams::opened(self, host),
            Step::StreamSends(host) => streams::sent(self, host),
            Step::FrameArrives(number) => streams::arrives(self, number, settings),
            Step::StreamLostAtSource(number) => streams::lost_at_source(self, number),
            Step::StreamLostAtTarget(number) => streams::lost_at_target(self, number),
            Step::GuestWrites(host) => self.write_memory(host),
            Step::SourceClose(host) => source_side::close(self, host),
            Step::TargetClose(host) => target_side::close(self, host),
            Step::SourceAsks(host) => source_side::ask(self, host, true, settings),
            Step::TargetAsks(host) => target_side::ask(self, host, true, settings),
            Step::SourceTold(host) => {
                let answer = self.sending_mut(host).and_then(|sending| sending.answer.take());
                if let Some(answer) = answer {
                    source_side::handle(self, host, now, (*answer).clone(), settings);
                }
            }
            Step::TargetTold(host) => {
                let answer = self.receiving_mut(host).and_then(|receiving| receiving.answer.take());
                if let Some(answer) = answer {
                    target_side::handle(self, host, now, (*answer).clone(), settings);
                }
            }
            Step::Resolve(host, resume) => {
                let resolution =
                    if resume { source::Resolution::Resume } else { source::Resolution::Discard };
                source_side::handle(self, host, now, source::Event::Resolve(resolution), settings);
            }
            Step::Fault(fault) => {
                self.faults_left -= 1;
                self.go_wrong(fault, settings);
            }
        }
    }

    fn go_wrong(&mut self, fault: Fault, settings: &Settings) {
        match fault {
            Fault::ConnectFails(host) => source_side::not_connected(self, host, settings),
            Fault::Cut(number) => self.link_mut(number).into_iter().for_each(|link| link.cut = true),
            Fault::CutStream(number) => {
                self.data_link_mut(number).into_iter().for_each(|link| link.cut = true)
            }
            Fault::SourceAnswerLost(host) => source_side::ask(self, host, false, settings),
            Fault::TargetAnswerLost(host) => target_side::ask(self, host, false, settings),
            Fault::Reach(host) => self.witness.reached_by[host] ^= true,
            Fault::SourceJobFails(host, on_disk) => source_side::fail_job(self, host, on_disk),
            Fault::TargetJobFails(host, on_disk) => target_side::fail_job(self, host, on_disk),
            Fault::TooSlow(host) => source_side::tries_again(self, host, settings),
            Fault::Cancel(host) => {
                source_side::handle(self, host, Timestamp::default(), source::Event::Cancel, settings);
            }
            Fault::StopWaiting(host) => {
                if let Some(process) = self.process_mut(host) {
                    process.stopping = true;
                }
                target_side::handle(self, host, Timestamp::default(), target::Event::Cancel, settings);
            }
            Fault::Crash(host) => {
                self.owner_lost |= self.owns(host);
                self.crash(host);
            }
        }
    }

    fn start(&mut self, host: HostIndex) {
        let Some(Record { epoch, arrived_by, .. }) = self.hosts[host].disk.as_deref().cloned() else {
            return;
        };
        self.life += 1;
        let (life, memory, state) = (self.life, self.written, self.state);
        let guest = Guest { epoch, arrived_by, runs: true, life, memory, state, log: None };
        self.host_mut(host).process = Some(Process { guest: Some(guest), ..Process::default() });
    }

    fn reach_source(&mut self, number: u8, settings: &Settings) {
        let Some(link) = self.link_mut(number) else { return };
        let (host, message) = (link.from, link.to_source.pop_front());
        if let Some(message) = message {
            let event = source::Event::Message((*message).clone());
            source_side::handle(self, host, Timestamp::default(), event, settings);
        }
    }

    fn lost_at_source(&mut self, number: u8, settings: &Settings) {
        let Some(link) = self.link_mut(number) else { return };
        link.at_source = false;
        let host = link.from;
        if let Some(sending) = self.sending_mut(host)
            && sending.link == Some(number)
        {
            sending.link = None;
            let event = source::Event::Disconnected("it broke".to_owned());
            source_side::handle(self, host, Timestamp::default(), event, settings);
        }
    }

    fn lost_at_target(&mut self, number: u8, settings: &Settings) {
        let Some(link) = self.link_mut(number) else { return };
        link.at_target = false;
        let host = 1 - link.from;
        let Some(receiving) = self.receiving_mut(host) else { return };
        if receiving.newer == Some(number) {
            receiving.newer = None;
        }
        if receiving.link == Some(number) {
            receiving.link = None;
            let event = target::Event::Disconnected("it broke".to_owned());
            target_side::handle(self, host, Timestamp::default(), event, settings);
        }
    }

    /// Whether `host` owns the VM, so that losing it may cost the guest. Until the target knows that its record is durable,
    /// or the witness has given it leave, that is the source, whatever it has recorded: nobody else may run. Both are
    /// indispensable while a target that could not start the guest is giving it back, and while a record is on the target's
    /// disk without its knowledge.
    pub(crate) fn owns(&self, host: HostIndex) -> bool {
        let has_guest = self.guest(host).is_some();
        let gives_back =
            self.receiving(1 - host).is_some_and(|receiving| GIVING_BACK.contains(&receiving.core.phase()));
        let other_has_it = (self.takes_over(1 - host) && !gives_back)
            || (self.guest(1 - host).is_some() && self.has_leave_on_disk(1 - host));
        let has_leave =
            self.sending(host).is_none() && self.receiving(host).is_some() && self.has_leave_on_disk(host);
        (has_guest && !other_has_it) || self.takes_over(host) || has_leave
    }

    /// Whether `host` holds a machine that only it may run, as the target of a migration that is not over.
    pub(crate) fn takes_over(&self, host: HostIndex) -> bool {
        let written = |event: &Keyed<target::Event>| matches!(**event, target::Event::RecordWritten { .. });
        let leave = |receiving: &Receiving| {
            receiving.core.may_run()
                || (receiving.inbox.iter().any(written) && self.has_leave_on_disk(host))
                || self.witness.says_it_runs(receiving.migration)
        };
        self.sending(host).is_none()
            && self.receiving(host).is_some_and(|receiving| receiving.machine && leave(receiving))
    }

    fn has_leave_on_disk(&self, host: HostIndex) -> bool {
        self.hosts[host].disk.as_ref().is_some_and(|record| record.standing == Standing::Running)
    }
}

fn process_steps(host: HostIndex, process: &Process, has_room: bool, steps: &mut Vec<Step>) {
    if let Some(sending) = &process.sending {
        if !sending.jobs.is_empty() {
            steps.push(Step::SourceJob(host));
        } else if sending.outcome.is_some() {
            steps.push(Step::SourceClose(host));
        }
        if sending.outcome.is_none() {
            if !sending.inbox.is_empty() {
                steps.push(Step::SourceHears(host));
            }
            if sending.connecting && has_room {
                steps.push(Step::Connect(host));
            }
            if sending.asked.is_some() {
                steps.push(Step::SourceAsks(host));
            }
            if sending.answer.is_some() {
                steps.push(Step::SourceTold(host));
            }
            if sending.core.poll_timeout().is_some() {
                steps.push(Step::SourceTimeout(host));
            }
        }
    }
    if let Some(receiving) = &process.receiving {
        if !receiving.jobs.is_empty() {
            steps.push(Step::TargetJob(host));
        } else if receiving.outcome.is_some() {
            steps.push(Step::TargetClose(host));
        }
        if receiving.outcome.is_none() {
            if !receiving.inbox.is_empty() {
                steps.push(Step::TargetHears(host));
            }
            if receiving.asked.is_some() {
                steps.push(Step::TargetAsks(host));
            }
            if receiving.answer.is_some() {
                steps.push(Step::TargetTold(host));
            }
            if receiving.core.poll_timeout().is_some() {
                steps.push(Step::TargetTimeout(host));
            }
        }
    }
}
