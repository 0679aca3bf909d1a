//! The target's data streams: which are let in, their threads, and their end.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::thread::JoinHandle;

use ferry_protocol::admission::{JoinSecret, PROOF_BYTES, Place};
use ferry_protocol::frame::Join;
use ferry_protocol::message::Hello;
use ferry_protocol::target::Event;
use ferry_protocol::{Epoch, MemoryDigest, MigrationId, StreamIndex, VmId};
use ferry_vmm::confine::{self, Role};

use super::door::Joining;
use crate::ports::TargetVm;
use crate::stream::{Part, ReceivedMemory, StreamEvent, receive_stream};

/// The data streams that the migration under way expects, and the machine that they fill.
pub(super) struct Streams {
    pub(super) vm: Arc<dyn TargetVm>,
    /// Whether they take digests.
    verify: bool,
    /// What arrived by any of them.
    received: Arc<ReceivedMemory>,
    joined: Vec<bool>,
    sockets: Vec<std::net::TcpStream>,
    threads: Vec<JoinHandle<u32>>,
    /// What streams prove.
    admission: Admission,
    /// Which set of streams is let in, if any.
    session: Option<u32>,
    /// The digest of all that earlier sets brought; the first stream of a set takes it over.
    digest: MemoryDigest,
}

/// Tells the migration's own streams from others.
#[derive(Debug, Clone)]
pub(super) struct Admission {
    /// New for each attempt.
    pub(super) secret: JoinSecret,
    vm: VmId,
    /// The epoch in which the source runs it.
    epoch: Epoch,
    migration: MigrationId,
}

impl Admission {
    /// For the attempt that begins with `hello`.
    ///
    /// # Errors
    /// If there are no random numbers.
    pub(super) fn new(hello: &Hello) -> io::Result<Self> {
        let mut secret = [0; PROOF_BYTES];
        getrandom::fill(&mut secret).map_err(|error| io::Error::other(error.to_string()))?;
        let Hello { vm, epoch, migration, .. } = *hello;
        Ok(Self { secret: JoinSecret(secret), vm, epoch, migration })
    }

    /// Whether whoever sent this join was given the key for it.
    fn admits(&self, join: &Join) -> bool {
        let Self { ref secret, vm, epoch, migration } = *self;
        let Join { migration: joined, stream, session, proof } = *join;
        let place = Place { vm, epoch, migration, session, stream };
        joined == migration && secret.key(session).admits(&place, &proof)
    }
}

impl Streams {
    /// Lets in the first set of `count` streams.
    pub(super) fn new(vm: Arc<dyn TargetVm>, count: u16, verify: bool, admission: Admission) -> Self {
        let received = Arc::new(ReceivedMemory::new(vm.pages().layout().page_count()));
        Self {
            vm,
            verify,
            received,
            joined: vec![false; usize::from(count)],
            sockets: Vec::new(),
            threads: Vec::new(),
            admission,
            session: Some(0),
            digest: MemoryDigest::ZERO,
        }
    }

    /// Lets in another set.
    pub(super) const fn expect(&mut self, session: u32, digest: MemoryDigest) {
        (self.session, self.digest) = (Some(session), digest);
    }

    /// Takes a stream, unless it is of another set, as one that was under way when the link broke, or has joined before;
    /// says whether it did.
    ///
    /// # Errors
    /// What the operating system says of the socket or the thread.
    pub(super) fn take(
        &mut self,
        join: &Join,
        joining: Joining,
        report: impl Fn(Event) + Send + 'static,
    ) -> io::Result<bool> {
        let count = u16::try_from(self.joined.len()).expect("made of a u16");
        let (Some(index), true) = (StreamIndex::new(join.stream, count), self.session == Some(join.session))
        else {
            return Ok(false);
        };
        // Before it takes a place that somebody else may have a right to.
        if !self.admission.admits(join) {
            return Ok(false);
        }
        if std::mem::replace(&mut self.joined[usize::from(join.stream)], true) {
            return Ok(false);
        }
        let reader = joining.into_reader()?;
        let handle = reader.socket().try_clone()?;
        let (pages, received) = (self.vm.pages(), Arc::clone(&self.received));
        let digest = std::mem::take(&mut self.digest);
        let part = Part { verify: self.verify, session: join.session, digest };
        let name = format!("ferry-recv-{}", index.number());
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            confine::enter(Role::Data);
            let report = |event| {
                report(match event {
                    StreamEvent::Fence { fence, digest } => {
                        Event::FenceReached { stream: index, fence, digest }
                    }
                    StreamEvent::Failed(error) => Event::StreamFailed {
                        code: error.code(),
                        sentence: format!("data stream {}: {error}", index.number()),
                    },
                });
            };
            receive_stream(reader, pages, received, part, &report)
        })?;
        self.sockets.push(handle);
        self.threads.push(thread);
        Ok(true)
    }

    /// Lets no stream in any more and shuts the sockets, which ends the threads; what is returned waits for them, and says
    /// how many fences all of them have reached.
    pub(super) fn end(&mut self) -> impl FnOnce() -> u32 + Send + use<> {
        self.session = None;
        let all_joined = self.joined.iter().all(|joined| *joined);
        self.joined.fill(false);
        for socket in self.sockets.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut self.threads);
        move || {
            // A thread's panic is a stream that ended, which it had no way to report.
            let fences = threads.into_iter().map(|thread| thread.join().unwrap_or(0)).min();
            fences.filter(|_| all_joined).unwrap_or(0)
        }
    }

    /// The same, and what is returned says what the streams have brought.
    pub(super) fn interrupt(&mut self) -> impl FnOnce() -> Event + Send + use<> {
        let session = self.session.unwrap_or(0);
        let (end, received) = (self.end(), Arc::clone(&self.received));
        let page_count = self.vm.pages().layout().page_count();
        move || {
            let fences = end();
            let (arrived, digest) = received.arrived(page_count, session, fences);
            Event::StreamsEnded { arrived, digest }
        }
    }
}
