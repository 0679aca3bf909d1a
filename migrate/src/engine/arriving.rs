//! The data streams of a migration that arrives, each with a thread.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use ferry_protocol::StreamIndex;
use ferry_protocol::target::Event;
use ferry_vmm::confine::{self, Role};

use crate::ports::TargetVm;
use crate::stream::{ReceivedMemory, StreamEvent, receive_stream};
use crate::transport::data::DataReader;

/// The data streams that the migration under way expects.
pub(super) struct Streams {
    pub(super) vm: Arc<dyn TargetVm>,
    pub(super) count: u16,
    /// Whether they take digests.
    verify: bool,
    /// What arrived by any of them.
    received: Arc<ReceivedMemory>,
    joined: Vec<bool>,
    sockets: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Streams {
    pub(super) fn new(vm: Arc<dyn TargetVm>, count: u16, verify: bool) -> Self {
        let received = Arc::new(ReceivedMemory::new(vm.pages().layout().page_count()));
        let (sockets, threads) = (Vec::new(), Vec::new());
        Self { vm, count, verify, received, joined: vec![false; usize::from(count)], sockets, threads }
    }

    /// Whether a stream has not joined before. From now on it has.
    pub(super) fn claim(&mut self, index: StreamIndex) -> bool {
        let joined = self.joined.get_mut(usize::from(index.number()));
        joined.is_some_and(|joined| !std::mem::replace(joined, true))
    }

    /// Starts a stream's thread, which hands what happens to `report`.
    pub(super) fn start(
        &mut self,
        reader: DataReader,
        index: StreamIndex,
        report: impl Fn(Event) + Send + 'static,
    ) -> std::io::Result<()> {
        let handle = reader.socket().try_clone()?;
        let (pages, received, verify) = (self.vm.pages(), Arc::clone(&self.received), self.verify);
        let thread = Builder::new().name(format!("ferry-recv-{}", index.number())).spawn(move || {
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
            receive_stream(reader, pages, received, verify, &report);
        })?;
        self.sockets.push(handle);
        self.threads.push(thread);
        Ok(())
    }

    /// Shuts the sockets, which ends the threads; what is returned waits for them.
    pub(super) fn end(&mut self) -> impl FnOnce() + Send + use<> {
        for socket in self.sockets.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut self.threads);
        // A thread's panic is a stream that ended, which it had no way to report.
        move || threads.into_iter().for_each(|thread| drop(thread.join()))
    }
}
