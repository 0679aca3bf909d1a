//! The control connection between the two hosts, and how the target's host sorts what comes over it.

use std::time::Duration;

use ferry_protocol::message::{Abort, AbortCode, Hello};
use ferry_protocol::target::{self, Target};
use ferry_protocol::{Message, Timestamp, source, wire};

use super::scenario::{Way, What, When};
use super::source::RETRANSMISSION;
use super::world::{Due, World};

/// At most one control connection stands at a time; each has a number, so that what was under way on an older one
/// never arrives.
#[derive(Debug, Default)]
pub(super) struct Control {
    connection: Option<u32>,
    connections: u32,
    /// The connection that the target's process under way talks on.
    pub(super) targets: Option<u32>,
    /// Nothing can be connected before.
    outage_until: Timestamp,
    to_source: wire::Decoder,
    to_target: wire::Decoder,
    /// When what was sent last in either direction arrives.
    arrives_at: [Timestamp; 2],
    /// A source that waits until the target is done with the attempt before.
    waiting: Option<Hello>,
}

/// How long TCP waits for the other side's word before it gives a connection up, as the engine has set it.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// In which direction a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum To {
    Source,
    Target,
}

impl World {
    /// Sends `message` if there is a connection.
    pub(super) fn send(&mut self, to: To, message: &Message) {
        self.strike(When::Sending(message.message_type()));
        let Some(number) = self.control.connection else { return };
        if to == To::Source && self.control.targets != Some(number) {
            // The source has connected anew, and that connection is not this process's (yet).
            return;
        }
        self.trace(|| format!("-> {to:?}: {message:?}"));
        let lost = self.random.percent(self.scenario.link.loss_percent);
        let again = if lost { RETRANSMISSION } else { Duration::ZERO };
        let direction = usize::from(to == To::Source);
        let at = (self.now + self.scenario.link.latency + again)
            .max(self.control.arrives_at[direction])
            .max(self.partition_until[direction]);
        self.control.arrives_at[direction] = at;
        self.at(at, Due::Control(number, to, wire::encode(message)));
    }

    pub(super) fn connect(&mut self, delay: Duration) {
        if let Some(number) = self.control.connection.take() {
            self.after(self.scenario.link.latency, Due::Lost(number, To::Target));
        }
        self.after(delay + self.scenario.link.latency, Due::Connect(self.attempt));
    }

    /// The attempt to connect ends.
    pub(super) fn connected(&mut self) {
        if self.now < self.control.outage_until || self.partition_until.iter().any(|until| self.now < *until)
        {
            return self.tell_source(source::Event::Disconnected("no route to host".to_owned()));
        }
        self.control.connections += 1;
        self.control.connection = Some(self.control.connections);
        self.control.to_source = wire::Decoder::default();
        self.control.to_target = wire::Decoder::default();
        self.tell_source(source::Event::Connected);
    }

    /// Bytes of one message arrive.
    pub(super) fn arrive(&mut self, number: u32, to: To, bytes: &[u8]) {
        if self.control.connection != Some(number) {
            return;
        }
        let decoder = match to {
            To::Source => &mut self.control.to_source,
            To::Target => &mut self.control.to_target,
        };
        decoder.push(bytes);
        let message = decoder.next_message().expect("the peer is well").expect("a whole message");
        match to {
            To::Source => self.tell_source(source::Event::Message(message)),
            To::Target => self.message_to_target(message),
        }
    }

    fn message_to_target(&mut self, message: Message) {
        let Message::Hello(hello) = message else {
            return self.tell_target(target::Event::Message(message));
        };
        match &self.target {
            None => self.begin_target(hello),
            Some(target) if target.resumed_by(&hello) => {
                self.control.targets = self.control.connection;
                self.tell_target(target::Event::Reconnected);
            }
            Some(target) if target.is_ending() || target.superseded_by(&hello) => {
                self.control.waiting = Some(hello);
                self.tell_target(target::Event::Cancel);
            }
            Some(_) => {
                self.trace(|| format!("busy: {}", self.target.as_ref().map_or("", Target::phase)));
                let busy = wire::encode(&Message::Abort(Abort::new(AbortCode::Occupied, "it is busy")));
                let Some(number) = self.control.connection else { return };
                let latency = self.scenario.link.latency;
                self.after(latency, Due::Control(number, To::Source, busy));
                self.after(latency, Due::Closed(number));
            }
        }
    }

    /// Takes the source that waits, once the target is free.
    pub(super) fn take_waiting(&mut self) -> bool {
        if self.target.is_some() {
            return false;
        }
        match self.control.waiting.take() {
            Some(hello) => {
                self.begin_target(hello);
                true
            }
            None => false,
        }
    }

    fn begin_target(&mut self, hello: Hello) {
        let config = target::Config {
            host: "b".to_owned(),
            source: "a:1".to_owned(),
            carries_descriptors: false,
            name: None,
            record: self.target_disk.record.clone(),
            witness: None,
        };
        self.target = Some(Target::new(config, self.now));
        self.control.targets = self.control.connection;
        self.tell_target(target::Event::Message(Message::Hello(hello)));
    }

    /// One side closes its connection behind its last message.
    pub(super) fn close(&mut self, to: To) {
        let own = match to {
            To::Target => self.control.connection,
            To::Source => self.control.targets,
        };
        if let Some(number) = own {
            // Behind all that was sent, however often TCP had to send it.
            let direction = usize::from(to == To::Source);
            let at = (self.now + self.scenario.link.latency).max(self.control.arrives_at[direction]);
            self.at(at, Due::Closed(number));
        }
    }

    pub(super) fn closed(&mut self, number: u32) {
        if self.control.connection == Some(number) {
            self.cut_control(Duration::ZERO);
        }
    }

    pub(super) fn lost(&mut self, number: u32, at: To) {
        let reason = "connection reset".to_owned();
        match at {
            // A source that has connected anew no longer listens to the old connection.
            To::Source if self.control.connection.is_none() && number == self.control.connections => {
                self.tell_source(source::Event::Disconnected(reason));
            }
            To::Target if self.control.targets == Some(number) => {
                self.tell_target(target::Event::Disconnected(reason));
            }
            To::Source | To::Target => {}
        }
    }

    fn cut_control(&mut self, outage: Duration) {
        self.control.outage_until = self.control.outage_until.max(self.now + outage);
        self.control.waiting = None;
        if let Some(number) = self.control.connection.take() {
            self.after(Duration::ZERO, Due::Lost(number, To::Source));
            self.after(Duration::ZERO, Due::Lost(number, To::Target));
        }
    }

    /// Sets off the troubles that wait for `when`.
    pub(super) fn strike(&mut self, when: When) {
        while let Some(index) = self.troubles.iter().position(|trouble| trouble.when == when) {
            let trouble = self.troubles.remove(index);
            self.trouble(trouble.what);
        }
    }

    /// Something goes wrong now.
    pub(super) fn trouble(&mut self, what: What) {
        self.trace(|| format!("!! {what:?}"));
        match what {
            What::CutControl(outage) => self.cut_control(outage),
            What::CutAll(outage) => {
                self.cut_control(outage);
                self.break_streams();
            }
            What::CutStreams => self.break_streams(),
            What::Partition(outage, way) => {
                let until = self.now + outage;
                for (direction, cut) in [way != Way::ToSource, way != Way::ToTarget].into_iter().enumerate() {
                    if cut {
                        self.partition_until[direction] = self.partition_until[direction].max(until);
                    }
                }
                if let Some(rest) = outage.checked_sub(UNACKNOWLEDGED_MAX) {
                    self.after(UNACKNOWLEDGED_MAX, Due::Trouble(What::CutAll(rest)));
                }
            }
            What::CancelAtSource => {
                self.after(Duration::ZERO, Due::Source(self.attempt, source::Event::Cancel))
            }
            What::CancelAtTarget => {
                self.after(Duration::ZERO, Due::Target(self.process, target::Event::Cancel))
            }
            What::RestartTarget => self.after(Duration::ZERO, Due::RestartTarget),
            What::SourceDiskFull => self.source_disk.fail_next(false),
            What::SourceDiskUnsure => self.source_disk.fail_next(true),
            What::TargetDiskFull => self.target_disk.fail_next(false),
            What::NoMemoryAtTarget => self.target_refuses = true,
            What::SourceVmFails => {
                let failed = source::Event::VmFailed("KVM said no".to_owned());
                self.after(Duration::ZERO, Due::Source(self.attempt, failed));
            }
        }
    }

    /// The target's process dies and is started again, unless it holds a guest: that would be the end of the guest,
    /// as with any host that dies.
    pub(super) fn restart_target(&mut self) {
        let spared = ["recording that it runs", "starting", "running"];
        if self.target_guest.is_some() || self.target.as_ref().is_some_and(|t| spared.contains(&t.phase())) {
            return;
        }
        self.target = None;
        self.end_streams_at_target();
        self.incoming = None;
        self.target_memory = None;
        self.end_target_process();
        self.control.targets = None;
        self.cut_control(Duration::ZERO);
        self.break_streams();
    }
}
