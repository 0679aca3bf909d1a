//! Data streams: one stream and one page of memory, whose contents are a number that grows whenever the guest writes.
//!
//! ```text
//!  source: guest's page --Senders--> DataLink: Join, Page, Fence, ... --Received--> target's page
//! ```
//!
//! What the engine's threads do (`migrate/src/stream`, `migrate/src/engine/incoming.rs`) is done here by the same rules: what is known of
//! the target's page, which streams are let in, whose digest sums go on, what has arrived when a set of streams has ended. A stream's
//! connection may break by itself, and what was sent on one that its source has closed may still arrive. Packing, deltas, and chunks that
//! several streams share are left out.

use std::collections::VecDeque;

use ferry_protocol::digest::ChunkDigests;
use ferry_protocol::message::AbortCode;
use ferry_protocol::source::{self, RoundSent};
use ferry_protocol::target;
use ferry_protocol::{MemoryDigest, MigrationId, PAGE_BYTES, PageBitmap, PageDigest, StreamIndex};

use crate::keyed::Keyed;
use crate::settings::{Mistake, Settings};
use crate::step::Step;
use crate::world::{HostIndex, World};

/// More data connections than this wait to be looked at at no time.
const DATA_LINKS_MAX: usize = 2;

/// The memory's only page.
const PAGE: u64 = 0;

/// The contents of a page: zero as it is made, otherwise which write of the guest's it is of.
pub(crate) type Version = u8;

/// What travels on a data stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Frame {
    /// The first: which set of streams it belongs to.
    Join(u32),
    /// The page.
    Page(Version),
    /// The fence with this number.
    Fence(u32),
}

/// A data stream's connection as both ends see it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DataLink {
    pub(crate) number: u8,
    /// The host that made it.
    pub(crate) from: HostIndex,
    migration: MigrationId,
    frames: VecDeque<Frame>,
    /// Whether the source still uses it.
    pub(crate) at_source: bool,
    /// Whether the target does, or may yet.
    pub(crate) at_target: bool,
    /// What reads it at the target, once it was let in.
    thread: Option<Thread>,
    /// It is broken: what is under way may or may not arrive.
    pub(crate) cut: bool,
}

/// A stream's thread at the target.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Thread {
    session: u32,
    fences: u32,
    digest: Keyed<MemoryDigest>,
}

/// The source's side of the streams.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Senders {
    /// The set that is being opened.
    pub(crate) opening: Option<u32>,
    link: Option<u8>,
    /// Whether the round that is to be sent has the page, and its fence.
    round: Option<(bool, u32)>,
    /// The page as it was last sent.
    sent: Version,
    /// Whether the target has just that.
    known: bool,
    /// The page is not to be sent again, by mistake.
    forgotten: bool,
}

/// The target's side.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Received {
    /// Which set of streams is let in.
    expects: Option<u32>,
    joined: bool,
    /// The digest that the next stream's sum begins with.
    base: Keyed<MemoryDigest>,
    /// What is in memory.
    pub(crate) memory: Version,
    /// The set and the fences before it by which the page came last.
    round: (u32, u32),
    /// How many fences came by a stream that has ended by itself.
    fences: u32,
    /// The set that is being ended, if one is, and whether it had joined.
    ending: Option<(u32, bool)>,
    /// The state that was restored.
    pub(crate) state: Version,
}

impl Default for Received {
    fn default() -> Self {
        Self {
            expects: Some(0),
            joined: false,
            base: Keyed::new(MemoryDigest::ZERO),
            memory: 0,
            round: (0, 0),
            fences: 0,
            ending: None,
            state: 0,
        }
    }
}

fn page(version: Version) -> PageDigest {
    PageDigest::of(PAGE, &[version; PAGE_BYTES])
}

/// `sum` after the page was replaced.
fn replaced(sum: MemoryDigest, old: Version, new: Version) -> MemoryDigest {
    let mut digests = ChunkDigests::default();
    let _from_zero = digests.set(PAGE, page(old));
    sum.combine(digests.set(PAGE, page(new)))
}

impl World {
    pub(crate) fn data_link(&self, number: u8) -> Option<&DataLink> {
        self.data.iter().find(|link| link.number == number)
    }

    pub(crate) fn data_link_mut(&mut self, number: u8) -> Option<&mut DataLink> {
        self.data.iter_mut().find(|link| link.number == number)
    }

    /// What can happen on the streams without anything going wrong.
    pub(crate) fn stream_steps(&self, steps: &mut Vec<Step>) {
        for host in 0..2 {
            let Some(sending) = self.sending(host).filter(|sending| sending.outcome.is_none()) else {
                continue;
            };
            if sending.senders.opening.is_some() && self.data.len() < DATA_LINKS_MAX {
                steps.push(Step::StreamOpens(host));
            }
            let writes = sending.senders.link.filter(|_| sending.senders.round.is_some());
            if let Some(link) = writes.and_then(|number| self.data_link(number)) {
                steps.push(Step::StreamSends(host));
                // Whoever has nothing to write notices nothing.
                if link.cut || !link.at_target {
                    steps.push(Step::StreamLostAtSource(link.number));
                }
            }
        }
        for link in &self.data {
            if link.at_target && !link.frames.is_empty() {
                steps.push(Step::FrameArrives(link.number));
            }
            if link.at_target && (link.cut || (!link.at_source && link.frames.is_empty())) {
                steps.push(Step::StreamLostAtTarget(link.number));
            }
        }
    }

    /// Whether the guest of `host` may write its memory now: at any time while it runs and that matters.
    pub(crate) fn may_write(&self, host: HostIndex) -> bool {
        let logged = self.guest(host).is_some_and(|guest| guest.runs && guest.log.is_some());
        self.writes_left > 0 && logged && self.sending(host).is_some_and(|sending| sending.outcome.is_none())
    }

    /// The guest of `host` writes its memory.
    pub(crate) fn write_memory(&mut self, host: HostIndex) {
        self.writes_left -= 1;
        self.written += 1;
        let version = self.written;
        if let Some(guest) = self.process_mut(host).and_then(|process| process.guest.as_mut()) {
            guest.memory = version;
            guest.log = guest.log.map(|_| true);
        }
    }

    /// Forgets connections that neither end uses.
    pub(crate) fn tidy_streams(&mut self) {
        self.data.retain(|link| link.at_source || link.at_target);
        for link in self.data.iter_mut().filter(|link| !link.at_target) {
            link.frames.clear();
            link.thread = None;
        }
    }
}

/// Begins to open the set of streams with this number at the source on `host`; of `lacking` nothing is known any more.
pub(crate) fn open(
    world: &mut World,
    host: HostIndex,
    session: u32,
    lacking: Option<PageBitmap>,
    settings: &Settings,
) {
    let Some(sending) = world.sending_mut(host) else { return };
    if sending.core.join_key(session).is_none() {
        let reason = "the target has not said what they are let in with".to_owned();
        return sending.inbox.push_back(Keyed::new(source::Event::StreamFailed(reason)));
    }
    let senders = &mut sending.senders;
    senders.opening = Some(session);
    if lacking.is_some_and(|lacking| lacking.contains(PAGE)) {
        match settings.mistake {
            Some(Mistake::ForgetTheRound) => senders.forgotten = true,
            Some(Mistake::TakeLostForKnown) => {}
            _ => senders.known = false,
        }
    }
}

/// Closes them, whatever they are doing; what they have still to say no longer counts.
pub(crate) fn close(world: &mut World, host: HostIndex) {
    let Some(sending) = world.sending_mut(host) else { return };
    sending.inbox.retain(|event| {
        !matches!(
            **event,
            source::Event::RoundSent(_) | source::Event::StreamFailed(_) | source::Event::StreamsOpened
        )
    });
    (sending.senders.opening, sending.senders.round) = (None, None);
    let link = sending.senders.link.take();
    if let Some(link) = link.and_then(|number| world.data_link_mut(number)) {
        link.at_source = false;
    }
}

/// Has a round sent, if there is anything to send it with.
pub(crate) fn send(world: &mut World, host: HostIndex, pages: &PageBitmap, fence: u32) {
    if let Some(sending) = world.sending_mut(host)
        && sending.senders.link.is_some()
    {
        let forgotten = std::mem::take(&mut sending.senders.forgotten);
        sending.senders.round = Some((pages.contains(PAGE) && !forgotten, fence));
    }
}

/// The stream is connected, if anybody listens, and says what it is; whether it is let in it does not hear.
pub(crate) fn opened(world: &mut World, host: HostIndex) {
    let listens = world.process(1 - host).is_some_and(|process| process.listens);
    let number = (0..).find(|&number| world.data_link(number).is_none()).expect("links are few");
    let Some(sending) = world.sending_mut(host) else { return };
    let Some(session) = sending.senders.opening.take() else { return };
    if !listens {
        let reason = "the data streams can't be opened".to_owned();
        return sending.inbox.push_back(Keyed::new(source::Event::StreamFailed(reason)));
    }
    sending.inbox.push_back(Keyed::new(source::Event::StreamsOpened));
    sending.senders.link = Some(number);
    let migration = sending.migration;
    world.data.push(DataLink {
        number,
        from: host,
        migration,
        frames: VecDeque::from([Frame::Join(session)]),
        at_source: true,
        at_target: true,
        thread: None,
        cut: false,
    });
}

/// The stream sends its round: the page as it is now, unless the target is known to have just that, and the fence. What is written to a
/// connection that is broken is lost, which the stream notices later.
pub(crate) fn sent(world: &mut World, host: HostIndex) {
    let Some(version) = world.guest(host).map(|guest| guest.memory) else { return };
    let Some(sending) = world.sending_mut(host) else { return };
    let senders = &mut sending.senders;
    let (Some((with_page, fence)), Some(number)) = (senders.round.take(), senders.link) else { return };
    let mut frames = Vec::new();
    if with_page && !(senders.known && senders.sent == version) {
        (senders.sent, senders.known) = (version, true);
        frames.push(Frame::Page(version));
    }
    frames.push(Frame::Fence(fence));
    let round = RoundSent { digest: page(senders.sent).alone(), ..RoundSent::default() };
    sending.inbox.push_back(Keyed::new(source::Event::RoundSent(round)));
    if let Some(link) = world.data_link_mut(number)
        && link.at_target
        && !link.cut
    {
        link.frames.extend(frames);
    }
}

/// The source notices that the connection is gone.
pub(crate) fn lost_at_source(world: &mut World, number: u8) {
    let Some(link) = world.data_link_mut(number) else { return };
    link.at_source = false;
    let host = link.from;
    if let Some(sending) = world.sending_mut(host)
        && sending.senders.link == Some(number)
    {
        (sending.senders.link, sending.senders.round) = (None, None);
        sending.inbox.push_back(Keyed::new(source::Event::StreamFailed("it broke".to_owned())));
    }
}

/// The target does.
pub(crate) fn lost_at_target(world: &mut World, number: u8) {
    let Some(link) = world.data_link_mut(number) else { return };
    link.at_target = false;
    let (host, thread) = (1 - link.from, link.thread.take());
    if let (Some(receiving), Some(thread)) = (world.receiving_mut(host), thread) {
        receiving.streams.fences = thread.fences;
        receiving.inbox.push_back(Keyed::new(failed()));
    }
}

fn failed() -> target::Event {
    target::Event::StreamFailed { code: AbortCode::Internal, sentence: "it broke".to_owned() }
}

/// The next frame reaches the target.
pub(crate) fn arrives(world: &mut World, number: u8, settings: &Settings) {
    let Some(link) = world.data_link_mut(number) else { return };
    let (host, Some(frame)) = (1 - link.from, link.frames.pop_front()) else { return };
    match frame {
        Frame::Join(session) => join(world, host, number, session, settings),
        Frame::Page(version) => write(world, host, number, version),
        Frame::Fence(fence) => {
            let Some(thread) = link.thread.as_mut() else { return };
            thread.fences += 1;
            let digest = *thread.digest;
            let stream = StreamIndex::new(0, 1).expect("the only one");
            if let Some(receiving) = world.receiving_mut(host) {
                let reached = target::Event::FenceReached { stream, fence, digest };
                receiving.inbox.push_back(Keyed::new(reached));
            }
        }
    }
}

/// A stream of the set that is waited for is let in, once; any other is turned away.
fn join(world: &mut World, host: HostIndex, number: u8, session: u32, settings: &Settings) {
    let Some(link) = world.data_link(number) else { return };
    let migration = link.migration;
    let any = settings.mistake == Some(Mistake::LetOldStreamsIn);
    let receiving = world
        .receiving_mut(host)
        .filter(|receiving| receiving.machine && receiving.migration == migration)
        .filter(|receiving| {
            let Received { expects, joined, .. } = receiving.streams;
            expects == Some(session) && !joined || any && expects.is_some()
        });
    let thread = receiving.map(|receiving| {
        receiving.streams.joined = true;
        let digest = std::mem::replace(&mut receiving.streams.base, Keyed::new(MemoryDigest::ZERO));
        Thread { session, fences: 0, digest }
    });
    if let Some(link) = world.data_link_mut(number) {
        link.at_target = thread.is_some();
        link.thread = thread;
    }
}

/// The page is written into the target's memory, whoever runs on it.
fn write(world: &mut World, host: HostIndex, number: u8, version: Version) {
    let Some(receiving) = world.receiving_mut(host) else { return };
    let old = std::mem::replace(&mut receiving.streams.memory, version);
    if let Some(guest) = world.process_mut(host).and_then(|process| process.guest.as_mut()) {
        guest.memory = version;
    }
    let Some(thread) = world.data_link_mut(number).and_then(|link| link.thread.as_mut()) else { return };
    thread.digest = Keyed::new(replaced(*thread.digest, old, version));
    let round = (thread.session, thread.fences + 1);
    if let Some(receiving) = world.receiving_mut(host) {
        receiving.streams.round = round;
    }
}

/// No stream is let in any more. Those that stand are being shut; what they hold may still be taken in until that is done.
pub(crate) fn end(received: &mut Received) {
    let session = received.expects.take().unwrap_or(0);
    received.ending = Some((session, std::mem::take(&mut received.joined)));
}

/// They have ended: nothing of them is written any more, and this is what they have brought.
pub(crate) fn ended(world: &mut World, host: HostIndex) -> Option<target::Event> {
    let mut ended = None;
    for link in world.data.iter_mut().filter(|link| link.from != host && link.at_target) {
        if let Some(thread) = link.thread.take() {
            ended = Some(thread.fences);
            link.at_target = false;
        }
    }
    let receiving = world.receiving_mut(host)?;
    if ended.is_some() {
        receiving.inbox.push_back(Keyed::new(failed()));
    }
    let streams = &mut receiving.streams;
    let (session, joined) = streams.ending.take()?;
    let by_itself = std::mem::take(&mut streams.fences);
    let fences = if joined { ended.unwrap_or(by_itself) } else { 0 };
    let mut arrived = PageBitmap::empty(1);
    if streams.round == (session, fences + 1) {
        arrived.insert(PAGE);
    }
    Some(target::Event::StreamsEnded { arrived, digest: page(streams.memory).alone() })
}

/// The set with this number is let in from now on, and its sum goes on from `digest`.
pub(crate) fn expect(received: &mut Received, session: u32, digest: MemoryDigest) {
    (received.expects, received.base) = (Some(session), Keyed::new(digest));
}

/// The machine at `host`, or the attempt, is at its end, and so are its streams.
pub(crate) fn drop_all(world: &mut World, host: HostIndex) {
    world.data.iter_mut().filter(|link| link.from != host).for_each(|link| link.at_target = false);
    if let Some(receiving) = world.receiving_mut(host) {
        receiving.streams.expects = None;
    }
}
