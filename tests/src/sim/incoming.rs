//! The target's ends of the data streams: which set is let in, what arrives, and what becomes of what was under way when a
//! set ends.

use ferry_protocol::message::AbortCode;
use ferry_protocol::target::Event;
use ferry_protocol::{MemoryDigest, PageBitmap, StreamIndex, source};

use super::stream::Receiver;
use super::world::{Due, World};

/// What the target has of the data streams of the migration under way.
#[derive(Debug)]
pub(super) struct Incoming {
    receivers: Vec<Receiver>,
    /// The set that is let in, by the number in its streams' joins.
    expected: Option<u32>,
    /// The set that is open, by its number in this world.
    open: Option<u32>,
}

impl Incoming {
    pub(super) fn new(streams: u16) -> Self {
        let receivers = (0..streams).map(|_| Receiver::new()).collect();
        Self { receivers, expected: Some(0), open: None }
    }

    pub(super) fn digest(&self) -> MemoryDigest {
        self.receivers.iter().map(Receiver::digest).fold(MemoryDigest::ZERO, MemoryDigest::combine)
    }
}

impl World {
    /// Whether the set of streams `session` is let in.
    pub(super) fn let_in(&mut self, session: u32, join: u32) -> bool {
        let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.expected == Some(join)) else {
            return false;
        };
        incoming.expected = None;
        incoming.open = Some(session);
        true
    }

    /// The target lets in another set.
    pub(super) fn expect_streams(&mut self, join: u32, digest: MemoryDigest) {
        let incoming = self.incoming.as_mut().expect("a machine has streams");
        assert_eq!(digest, incoming.digest(), "the sum goes on from all that has arrived");
        incoming.receivers.iter_mut().for_each(Receiver::reopen);
        incoming.expected = Some(join);
        if let Some(late) = self.late_frame.take() {
            // The bug: what an ended stream had under way lands all the same.
            let delay = self.about_us(8_000);
            self.after(delay, Due::LateFrame(late.0, late.1));
        }
    }

    /// A frame arrives.
    pub(super) fn frame(&mut self, session: u32, stream: StreamIndex, bytes: &[u8]) {
        if self.incoming.as_ref().is_some_and(|incoming| incoming.open == Some(session)) {
            self.write_frame(stream, bytes);
        }
    }

    /// Writes a frame into the target's memory, whichever set of streams it came by.
    pub(super) fn write_frame(&mut self, stream: StreamIndex, bytes: &[u8]) {
        let round = self.round;
        let Self { incoming: Some(incoming), target_memory: Some(memory), injection, .. } = self else {
            return;
        };
        let receiver = &mut incoming.receivers[usize::from(stream.number())];
        let event = match receiver.receive(bytes, memory, round, injection) {
            Ok(None) => return,
            Ok(Some((fence, digest))) => Event::FenceReached { stream, fence, digest },
            Err(error) => Event::StreamFailed { code: AbortCode::Protocol, sentence: error.to_string() },
        };
        self.tell_target(event);
    }

    /// The source has closed its ends of set `session`, or they broke.
    pub(super) fn end_of_streams(&mut self, session: u32) {
        if self.incoming.as_ref().is_some_and(|incoming| incoming.open == Some(session)) {
            let (code, sentence) = (AbortCode::Internal, "connection reset".to_owned());
            self.tell_target(Event::StreamFailed { code, sentence });
        }
    }

    /// The target ends its streams. What is under way is lost, but some of it may have been half-way into memory.
    pub(super) fn end_streams_at_target(&mut self) {
        let Some(incoming) = &mut self.incoming else { return };
        incoming.expected = None;
        let Some(session) = incoming.open.take() else { return };
        let failed = source::Event::StreamFailed("connection reset".to_owned());
        self.through_link(self.scenario.link.latency, Due::Stream(session, failed));
        let under_way: Vec<_> = self
            .queue
            .values()
            .filter_map(|due| {
                let Due::Frame(of, stream, bytes) = due else { return None };
                (*of == session).then(|| (*stream, bytes.clone()))
            })
            .collect();
        for (stream, bytes) in under_way {
            if self.lost_page.is_none() {
                self.lost_page = Receiver::first_page(&bytes, self.scenario.layout.page_count());
            }
            if self.injection.lets_land_late() {
                self.late_frame.get_or_insert((stream, bytes));
            } else if let Some(memory) = self.target_memory.as_mut().filter(|_| self.random.percent(50)) {
                Receiver::tear(&bytes, memory);
            }
        }
    }

    /// What the streams that have ended had brought since the last fence that all of them had reached.
    pub(super) fn arrived(&mut self) -> (PageBitmap, MemoryDigest) {
        let page_count = self.scenario.layout.page_count();
        let incoming = self.incoming.as_ref().expect("a machine has streams");
        let fences = incoming.receivers.iter().map(Receiver::fences).min().unwrap_or(0);
        let mut arrived = PageBitmap::empty(page_count);
        incoming.receivers.iter().flat_map(|r| r.arrived(fences)).for_each(|page| arrived.insert(page));
        let digest = incoming.digest();
        if let Some(page) = self.lost_page.take().filter(|page| self.injection.overclaims(&arrived, *page)) {
            arrived.insert(page);
        }
        (arrived, digest)
    }
}
