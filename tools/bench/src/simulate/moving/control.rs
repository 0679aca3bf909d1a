//! The control connection: messages arrive in order, after the link's latency and whatever waits in front of them.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_migrate::protocol::message::MessageType;
use ferry_migrate::protocol::target::{self as target_core, Target};
use ferry_migrate::protocol::{Message, Timestamp, wire};

use super::super::costs::float;
use super::super::network::FlowRequest;
use super::{Due, Moving, Purpose, Stage, us};

/// Messages up to this long are taken to need no time on the link beyond its latency.
const SMALL_BYTES: usize = 16 << 10;

/// One direction of the connection.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// When the last message arrives: none overtakes another.
    last_at: Duration,
    /// What waits behind a large message.
    waiting: VecDeque<Message>,
}

impl Lane {
    /// When a message that takes until `at` arrives.
    fn in_order(&mut self, at: Duration) -> Duration {
        self.last_at = self.last_at.max(at);
        self.last_at
    }
}

impl Moving {
    pub(super) fn send_to_source(&mut self, message: Message, stage: &mut Stage<'_>) {
        let queued = self.order.route.queue_backward(stage.network);
        let took =
            self.order.route.latency + queued + self.scattered(stage.hardware.message_us, stage.hardware);
        let at = self.source_side.lane.in_order(stage.now + took);
        stage.at(at, Due::ToSource(message));
    }

    pub(super) fn send_to_target(&mut self, message: Message, stage: &mut Stage<'_>) {
        if self.message_flow.is_some() {
            return self.target_side.lane.waiting.push_back(message);
        }
        // Only a guest's state grows with the guest.
        let is_state = message.message_type() == MessageType::State;
        let bytes = if is_state { wire::encode(&message).len() } else { 0 };
        if bytes <= SMALL_BYTES {
            return self.deliver_to_target(message, stage);
        }
        let route = &self.order.route;
        let bytes = float(u64::try_from(bytes).expect("usize fits u64"));
        let request = FlowRequest {
            bytes,
            buffered_bytes: 0.0,
            uses: route.forward.iter().map(|&resource| (resource, stage.hardware.wire_overhead)).collect(),
            weight: 1.0,
            rate_max: route.window_rate(1, stage.hardware),
        };
        self.message_flow = Some((stage.network.add_flow(request), Purpose::Message(Box::new(message))));
    }

    /// A large message has left; what waited behind it follows.
    pub(super) fn message_has_gone(&mut self, stage: &mut Stage<'_>) {
        if let Some((_, Purpose::Message(message))) = self.message_flow.take() {
            self.deliver_to_target(*message, stage);
        }
        while self.message_flow.is_none()
            && let Some(message) = self.target_side.lane.waiting.pop_front()
        {
            self.send_to_target(message, stage);
        }
    }

    fn deliver_to_target(&mut self, message: Message, stage: &mut Stage<'_>) {
        let queued = self.order.route.queue_forward(stage.network);
        let took =
            self.order.route.latency + queued + self.scattered(stage.hardware.message_us, stage.hardware);
        let at = self.target_side.lane.in_order(stage.now + took);
        stage.at(at, Due::ToTarget(message));
    }

    /// As the engine's listener does: the first message makes the target.
    pub(super) fn message_to_target(&mut self, now: Timestamp, message: Message) {
        if self.target.is_none() {
            let config = target_core::Config {
                host: "target".to_owned(),
                source: "source".to_owned(),
                carries_descriptors: false,
                name: None,
                record: None,
                witness: None,
            };
            self.target = Some(Target::new(config, now));
        }
        self.tell_target(now, target_core::Event::Message(message));
    }

    /// How long a connection takes to stand: one round trip and both ends' work.
    pub(super) fn handshake(&mut self, stage: &Stage<'_>) -> Duration {
        self.order.route.latency * 2 + us(stage.hardware.message_us)
    }
}
