//! What a caller implements: the VM at either side, durable records, the clock.
//!
//! All methods may block; the engine calls them on threads of its own, those of one VM one after another.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_protocol::message::{AbortCode, NetworkIdentity};
use ferry_protocol::{
    ChunkIndex, MemoryLayout, PAGE_BYTES, PageBitmap, PageMask, PageRange, Record, Timestamp, VmId,
};

/// Whatever a port's implementation fails with; its chain of causes reaches the user.
pub type PortError = Box<dyn Error + Send + Sync>;

/// Guest memory by page, shared by all data streams.
///
/// Ranges come from the protocol core, which has checked them against [`GuestPages::layout`].
pub trait GuestPages: Send + Sync {
    /// The guest's RAM.
    fn layout(&self) -> MemoryLayout;

    /// Shows each page of `range` to `visit` with its number. The guest may be writing to the page meanwhile;
    /// it is then dirty and will be sent again.
    fn for_each_page(&self, range: PageRange, visit: &mut dyn FnMut(u64, &[u8; PAGE_BYTES]));

    /// Writes `header` and then the pages of `ranges` to `socket`, all of them.
    ///
    /// # Errors
    /// What the socket says, [`io::ErrorKind::TimedOut`] if it takes no more within its timeout.
    fn send(&self, socket: BorrowedFd<'_>, header: &[u8], ranges: &[PageRange]) -> io::Result<()>;

    /// Reads the pages of `ranges` from `socket`, all of them.
    ///
    /// # Errors
    /// What the socket says, [`io::ErrorKind::UnexpectedEof`] if the peer closed it before.
    fn receive(&self, socket: BorrowedFd<'_>, ranges: &[PageRange]) -> io::Result<()>;

    /// Writes one page.
    fn write(&self, page: u64, bytes: &[u8; PAGE_BYTES]);

    /// Overwrites part of a page from its byte `at` on.
    ///
    /// # Panics
    /// If the page ends before `bytes` do.
    fn patch(&self, page: u64, at: usize, bytes: &[u8]);

    /// Makes the pages of `range` read as zero, without touching those that never held anything else.
    ///
    /// # Errors
    /// What the operating system says.
    fn zero(&self, range: PageRange) -> io::Result<()>;

    /// The pages of `chunk` that may hold something else than zeroes, without reading or allocating any. While the guest
    /// runs, a page that is left out is only known to be zero if its dirty log was reset before this call: what is
    /// written later is then dirty again.
    fn touched(&self, chunk: ChunkIndex) -> PageMask;
}

/// The state of a paused guest.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// vCPUs, interrupt controllers, clocks and devices, in the machine monitor's own format.
    pub state: Vec<u8>,
    /// What to announce at the target.
    pub network: NetworkIdentity,
    /// Whether the guest ran before [`SourceVm::pause`].
    pub runs: bool,
}

/// A VM that is to move away.
pub trait SourceVm: Send + Sync + 'static {
    /// What a target has to build, in the machine monitor's own format.
    fn description(&self) -> Vec<u8>;

    /// Its memory.
    fn pages(&self) -> Arc<dyn GuestPages>;

    /// A descriptor of its memory, end to end as [`SourceVm::pages`] has it, for another process of this host to map.
    ///
    /// # Errors
    /// If it is private to this process, with what to do about that.
    fn memory_descriptor(&self) -> Result<OwnedFd, PortError>;

    /// Begins to log dirty pages.
    ///
    /// # Errors
    /// If the log can't be switched on; nothing has changed then.
    fn start_dirty_log(&self) -> Result<(), PortError>;

    /// All pages written since the last call (or the start) by the guest and by devices, and forgets them.
    ///
    /// # Errors
    /// If the log can't be read. The attempt is given up: pages may have been forgotten.
    fn read_dirty_log(&self) -> Result<PageBitmap, PortError>;

    /// Stops logging.
    ///
    /// # Errors
    /// If it can't be switched off; the guest then only runs slower.
    fn stop_dirty_log(&self) -> Result<(), PortError>;

    /// Returns once nothing but the engine can touch guest memory. A VM that its operator has paused stays so.
    ///
    /// # Errors
    /// If the VM can't be stopped, or has ended by itself.
    fn pause(&self) -> Result<(), PortError>;

    /// Brings what the guest has written to its disks to their storage, so that [`SourceVm::save`] has little left to. The
    /// guest runs meanwhile.
    ///
    /// # Errors
    /// If a disk fails.
    fn settle(&self) -> Result<(), PortError>;

    /// The state of the paused guest. What it has written to its disks is on their storage when this returns.
    ///
    /// # Errors
    /// If any part of it can't be saved, or a disk fails.
    fn save(&self) -> Result<SavedState, PortError>;

    /// Gives up what only the owner of the VM may hold, as the locks of its disks: called once the commit is durable, and
    /// before the target hears of it. What can't be given up shows at the target, which can't run the VM then.
    fn let_go(&self);

    /// Makes the VM what it was before [`SourceVm::pause`] and takes back what [`SourceVm::let_go`] has given up; nothing to
    /// do if neither was called.
    ///
    /// # Errors
    /// If it can't run any more, or somebody else has what it needs.
    fn resume(&self) -> Result<(), PortError>;

    /// Lets go of the VM for good: the target runs it.
    fn release(&self);
}

/// Why a target can't build a machine.
#[derive(Debug)]
pub struct BuildRefusal {
    /// [`AbortCode::NoMemory`] or [`AbortCode::CannotBuild`].
    pub code: AbortCode,
    /// The cause, with its own causes.
    pub cause: PortError,
}

/// A host that can take in a VM.
pub trait TargetHost: Send + Sync + 'static {
    /// Builds the empty machine for `vm`.
    ///
    /// # Errors
    /// A refusal, before the first page has moved.
    fn build(
        &self,
        vm: VmId,
        description: &[u8],
        layout: &MemoryLayout,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal>;

    /// Builds the machine for `vm` on `memory`, which the source's guest goes on using: nothing may be written to it before
    /// [`TargetVm::run`]. Whoever sends it may be wrong, so it is checked before it is mapped.
    ///
    /// # Errors
    /// A refusal, with the memory let go of.
    fn adopt(
        &self,
        vm: VmId,
        description: &[u8],
        layout: &MemoryLayout,
        memory: OwnedFd,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal>;
}

/// A machine that is being filled.
pub trait TargetVm: Send + Sync + 'static {
    /// Its memory.
    fn pages(&self) -> Arc<dyn GuestPages>;

    /// Forgets frames that queued in its network interface while the guest still ran at the source.
    fn drop_stale_frames(&self);

    /// Restores vCPUs and devices; the guest does not run yet. Where the link broke before the source heard of it, the guest
    /// goes on there, and a later state is restored over this one.
    ///
    /// # Errors
    /// If any part of the state can't be restored.
    fn restore(&self, state: &[u8]) -> Result<(), PortError>;

    /// Takes what only the owner of the VM may hold, and runs the guest, or takes it over paused if `runs` is false.
    ///
    /// # Errors
    /// If it can't be started. No instruction of the guest has run then, and nothing is held that the source needs.
    fn run(&self, runs: bool) -> Result<(), PortError>;

    /// Writes a frame to the network as if the guest had sent it.
    ///
    /// # Errors
    /// What the tap says.
    fn announce(&self, frame: &[u8]) -> io::Result<()>;

    /// Lets go of the machine: it never runs.
    fn discard(&self);
}

/// A place for durable records, one for each VM.
pub trait RecordStore: Send + Sync + 'static {
    /// The record of `vm`, if there is one.
    ///
    /// # Errors
    /// If there is one but it can't be read: the VM is then in doubt.
    fn load(&self, vm: VmId) -> Result<Option<Record>, PortError>;

    /// Replaces the record of the VM that it speaks of, and returns only once that is durable.
    ///
    /// # Errors
    /// If it is not certain that the new record would survive a crash.
    fn store(&self, record: &Record) -> Result<(), PortError>;
}

/// Where the engine has the time from.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Now, since an origin that never changes.
    fn now(&self) -> Timestamp;
}

/// The operating system's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    origin: Instant,
}

impl Default for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the Clock that everything else asks")]
    fn default() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_origin(self.origin.elapsed())
    }
}

/// Runs `work` and says how long it took by `clock`.
pub(crate) fn timed<T>(clock: &dyn Clock, work: impl FnOnce() -> T) -> (T, Duration) {
    let began = clock.now();
    let result = work();
    (result, clock.now().since(began))
}

/// An error with all its causes in one line, as peers and logs get it.
pub(crate) fn in_words(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

impl fmt::Display for BuildRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&in_words(&*self.cause))
    }
}
