//! Connecting, agreeing on version and features, having the target build its machine, opening the streams.
//! Nothing has touched the guest yet, so every failure here is cheap.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a phase has no use for is dropped or refused in one place; the table test has every pair"
)]

use crate::liveness::Liveness;
use crate::message::{Describe, Hello, KeepFor, Message, Welcome};
use crate::negotiation::{Features, common_version};
use crate::time::Timestamp;
use crate::wire::{VERSION_NEWEST, VERSION_OLDEST};

use super::undo::undo;
use super::{
    Action, Context, Event, Failure, MemoryPath, NEGOTIATION_TIMEOUT, Phase, Progress, local, precopy,
};
use super::{features_offered, features_wanted, interruption, out_of_turn};
use std::time::Duration;

/// The control connection is being made.
#[derive(Debug, Clone)]
pub(super) struct Connecting {
    pub(super) deadline: Timestamp,
}

/// `Hello` is sent.
#[derive(Debug, Clone)]
pub(super) struct Greeting {
    pub(super) deadline: Timestamp,
}

/// `Describe` is sent.
#[derive(Debug, Clone)]
pub(super) struct Describing {
    pub(super) deadline: Timestamp,
}

/// The data streams are being opened.
#[derive(Debug, Clone)]
pub(super) struct OpeningStreams {
    pub(super) deadline: Timestamp,
}

pub(super) fn begin(context: &mut Context, now: Timestamp) -> Phase {
    context.act(Action::Connect { delay: Duration::ZERO });
    Phase::Connecting(Connecting { deadline: now + NEGOTIATION_TIMEOUT })
}

/// The `Hello` of this migration.
pub(super) fn hello(context: &Context, resumes: bool) -> Message {
    let config = &context.config;
    Message::Hello(Hello {
        version_oldest: VERSION_OLDEST,
        version_newest: VERSION_NEWEST,
        features: features_offered(config),
        migration: config.migration,
        vm: config.vm,
        name: config.name.clone(),
        epoch: config.epoch,
        resumes,
    })
}

impl Connecting {
    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return undo(failure, context);
        }
        match event {
            Event::Connected => {
                context.send(hello(context, false));
                Phase::Greeting(Greeting { deadline: now + NEGOTIATION_TIMEOUT })
            }
            Event::Timeout => undo(too_slow("to be connected"), context),
            other => stay_or_undo(&other, "connecting", Phase::Connecting(self), context),
        }
    }
}

impl Greeting {
    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return undo(failure, context);
        }
        match event {
            Event::Message(Message::Welcome(welcome)) => {
                if common_version(welcome.version, welcome.version) != Some(welcome.version) {
                    let text = format!("it chose version {} of the protocol", welcome.version);
                    return undo(Failure::Protocol(text), context);
                }
                if !welcome.features.contains(features_wanted(&context.config)) {
                    let text = match context.config.memory {
                        MemoryPath::Streams => {
                            "it can't unpack pages that are packed like this; migrate with --compress none"
                        }
                        MemoryPath::HandedOver => {
                            "it can't take memory over by descriptor; start a newer ferry there, or use TCP"
                        }
                    };
                    return undo(Failure::Protocol(text.to_owned()), context);
                }
                if let Err(failure) = agree_on_witness(&welcome, context) {
                    return undo(failure, context);
                }
                context.features = welcome.features.both(features_offered(&context.config));
                if context.features.contains(Features::KEEPALIVE) {
                    context.liveness = Some(Liveness::new(now));
                }
                context.host.clone_from(&welcome.host);
                context.report(Progress::Negotiated { version: welcome.version, host: welcome.host });
                if context.config.memory == MemoryPath::HandedOver {
                    return local::begin(context, now);
                }
                context.send(Message::Describe(Describe {
                    description: context.config.description.clone(),
                    regions: context.layout.regions().to_vec(),
                    streams: context.config.streams,
                }));
                Phase::Describing(Describing { deadline: now + NEGOTIATION_TIMEOUT })
            }
            Event::Timeout => undo(too_slow("to answer the greeting"), context),
            other => stay_or_undo(&other, "greeting", Phase::Greeting(self), context),
        }
    }
}

/// Both sides have the same witness or none: what one of them asks a witness, the other must hear of.
fn agree_on_witness(welcome: &Welcome, context: &mut Context) -> Result<(), Failure> {
    let Some(witness) = context.config.witness else { return Ok(()) };
    if !welcome.features.contains(Features::WITNESS) {
        let text =
            "it has no witness, but this host has; start 'ferry receive' there with the same --witness";
        return Err(Failure::Protocol(text.to_owned()));
    }
    context.send(Message::Witness(witness));
    Ok(())
}

impl Describing {
    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return undo(failure, context);
        }
        match event {
            Event::Message(Message::Ready(ready)) => {
                context.costs.target_record.add(Duration::from_micros(ready.record_us));
                if context.features.contains(Features::RESUMPTION) {
                    let wait_ms = u32::try_from(context.config.reconnect.as_millis()).unwrap_or(u32::MAX);
                    context.send(Message::KeepFor(KeepFor { wait_ms }));
                }
                context.act(Action::OpenStreams { verify: context.verifies() });
                Phase::OpeningStreams(OpeningStreams { deadline: now + NEGOTIATION_TIMEOUT })
            }
            Event::Timeout => undo(too_slow("to build the machine"), context),
            other => stay_or_undo(&other, "the target builds", Phase::Describing(self), context),
        }
    }
}

impl OpeningStreams {
    pub(super) fn on(self, now: Timestamp, event: Event, context: &mut Context) -> Phase {
        if let Some(failure) = interruption(&event) {
            return undo(failure, context);
        }
        match event {
            Event::StreamsOpened => precopy::begin(context, now),
            Event::Timeout => undo(too_slow("to take the data streams"), context),
            other => stay_or_undo(&other, "opening streams", Phase::OpeningStreams(self), context),
        }
    }
}

pub(super) fn too_slow(what: &str) -> Failure {
    let text = format!(
        "the target took longer than {} s {what}; is it a ferry, and does a firewall let it answer?",
        NEGOTIATION_TIMEOUT.as_secs()
    );
    Failure::Timeout(text)
}

/// A phase goes on unless the event was a peer's message out of turn.
pub(super) fn stay_or_undo(event: &Event, name: &'static str, phase: Phase, context: &mut Context) -> Phase {
    match out_of_turn(event, name) {
        Ok(()) => phase,
        Err(failure) => undo(failure, context),
    }
}
