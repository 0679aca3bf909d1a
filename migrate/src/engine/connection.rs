//! A target's control connection: a task hands on what arrives, never more than the engine has dealt with.

use std::sync::Arc;

use ferry_protocol::target::Event;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::door::Link;
use super::target::Happened;
use crate::transport::control::{ControlWriter, Incoming, UNHANDLED_MAX};

pub(super) struct Connection {
    pub(super) writer: ControlWriter,
    pub(super) reader: JoinHandle<()>,
}

/// Takes over the connection with this number.
pub(super) fn connect(link: Link, number: u64, events: &mpsc::UnboundedSender<Happened>) -> Connection {
    let Link { mut reader, writer, .. } = link;
    let events = events.clone();
    let unhandled = Arc::new(Semaphore::new(UNHANDLED_MAX));
    let reader = tokio::spawn(async move {
        loop {
            let event = match reader.next().await {
                Ok(Incoming { message, memory }) => {
                    if let Some(memory) = memory
                        && events.send(Happened::Memory(number, memory)).is_err()
                    {
                        return;
                    }
                    Event::Message(message)
                }
                Err(error) => Event::Disconnected(error.to_string()),
            };
            let ended = matches!(event, Event::Disconnected(_));
            let permit = unhandled.clone().acquire_owned().await.ok();
            if events.send(Happened::Link(number, event, permit)).is_err() || ended {
                return;
            }
        }
    });
    Connection { writer, reader }
}
