//! Fits [`ferry_vmm::Machine`] to the engine's ports.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ferry_protocol::bitmap::CHUNK_PAGES;
use ferry_protocol::layout::Region;
use ferry_protocol::message::AbortCode;
use ferry_protocol::{ChunkIndex, MemoryLayout, PAGE_BYTES, PageBitmap, PageMask, PageRange, VmId};
use ferry_vmm::{BuildError, GuestRam, LocalChoices, Machine, MachineConfig, MachineStatus, MemoryError};

use crate::announce::LearnedAddresses;
use crate::fault::{self, SourceStep, Step, TargetStep};
use crate::ports::{
    BuildRefusal, GuestPages, PortError, SavedState, SourceVm, TargetHost, TargetVm, in_words,
};

/// Guest memory of a [`Machine`].
#[derive(Debug, Clone)]
pub struct MachinePages {
    ram: GuestRam,
    layout: MemoryLayout,
    /// The source, whose dirty log is asked. It may be gone while its memory is still being read.
    source: Option<Weak<Machine>>,
}

impl MachinePages {
    /// The memory of `machine`.
    ///
    /// # Panics
    /// Never: a machine's own regions always make a layout.
    #[must_use]
    pub fn new(ram: GuestRam) -> Self {
        let regions = ram.regions().iter().map(|region| Region { gpa: region.gpa, bytes: region.bytes });
        let layout = MemoryLayout::new(regions.collect()).expect("a machine's own regions are in order");
        ram.open_page_tables();
        Self { ram, layout, source: None }
    }

    /// The memory of a source: what its dirty log is still to report for the first time counts as untouched until then.
    #[must_use]
    pub fn of_source(machine: &Arc<Machine>) -> Self {
        Self { source: Some(Arc::downgrade(machine)), ..Self::new(machine.ram()) }
    }
}

/// Ranges are checked against the layout before they get here.
const IN_LAYOUT: &str = "the range lies inside the guest's memory";

impl GuestPages for MachinePages {
    fn layout(&self) -> MemoryLayout {
        self.layout.clone()
    }

    fn for_each_page(&self, range: PageRange, visit: &mut dyn FnMut(u64, &[u8; PAGE_BYTES])) {
        self.ram.for_each_page(range.first(), range.count(), visit).expect(IN_LAYOUT);
    }

    fn send(&self, socket: BorrowedFd<'_>, header: &[u8], ranges: &[PageRange]) -> io::Result<()> {
        let runs: Vec<(u64, u64)> = ranges.iter().map(|range| (range.first(), range.count())).collect();
        self.ram.send_pages(socket, header, &runs).map(drop)
    }

    fn receive(&self, socket: BorrowedFd<'_>, ranges: &[PageRange]) -> io::Result<()> {
        let runs: Vec<(u64, u64)> = ranges.iter().map(|range| (range.first(), range.count())).collect();
        self.ram.receive_pages(socket, &runs)
    }

    fn write(&self, page: u64, bytes: &[u8; PAGE_BYTES]) {
        self.ram.write_page(page, bytes).expect(IN_LAYOUT);
    }

    fn patch(&self, page: u64, at: usize, bytes: &[u8]) {
        self.ram.patch_page(page, at, bytes).expect(IN_LAYOUT);
    }

    fn zero(&self, range: PageRange) -> io::Result<()> {
        self.ram.zero_pages(range.first(), range.count()).map_err(io::Error::other)
    }

    fn touched(&self, chunk: ChunkIndex) -> PageMask {
        let first = chunk.first_page();
        let count = CHUNK_PAGES.min(self.layout.page_count() - first);
        let mut mask = PageMask::EMPTY;
        let source = self.source.as_ref().and_then(Weak::upgrade);
        if source.is_some_and(|source| source.is_report_due(first)) {
            return mask;
        }
        let insert = |from: u64, count: u64| (from..from + count).for_each(|page| mask.insert(page - first));
        self.ram.touched(first, count, insert).expect(IN_LAYOUT);
        mask
    }
}

/// A machine that can be migrated, with the addresses its guest has been seen to use.
#[derive(Debug, Clone)]
pub struct MigratableMachine {
    machine: Arc<Machine>,
    addresses: Arc<Mutex<LearnedAddresses>>,
    /// Whether the migration's own pause stopped it, so that only that is undone.
    paused_by_engine: Arc<Mutex<bool>>,
}

impl MigratableMachine {
    /// Begins to watch what addresses the guest uses; `ipv4` and `ipv6` are known already.
    #[must_use]
    pub fn new(machine: Arc<Machine>, ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>) -> Self {
        let addresses = Arc::new(Mutex::new(LearnedAddresses::new(ipv4, ipv6)));
        if let Some(mac) = machine.mac() {
            let addresses = Arc::clone(&addresses);
            machine.set_frame_observer(Box::new(move |frame| lock(&addresses).observe(mac, frame)));
        }
        Self { machine, addresses, paused_by_engine: Arc::default() }
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// What would be announced for it now.
    #[must_use]
    pub fn network(&self) -> ferry_protocol::message::NetworkIdentity {
        lock(&self.addresses).identity(self.machine.mac())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SourceVm for MigratableMachine {
    fn description(&self) -> Vec<u8> {
        self.machine.description()
    }

    fn pages(&self) -> Arc<dyn GuestPages> {
        Arc::new(MachinePages::of_source(&self.machine))
    }

    fn memory_descriptor(&self) -> Result<OwnedFd, PortError> {
        Ok(self.machine.ram().descriptor()?)
    }

    fn start_dirty_log(&self) -> Result<(), PortError> {
        Ok(self.machine.start_dirty_log()?)
    }

    fn read_dirty_log(&self) -> Result<PageBitmap, PortError> {
        let page_count = self.machine.ram().page_count();
        let mut words = vec![0; PageBitmap::words_for(page_count)];
        self.machine.collect_dirty(&mut words)?;
        Ok(PageBitmap::from_words(words, page_count)?)
    }

    fn stop_dirty_log(&self) -> Result<(), PortError> {
        Ok(self.machine.stop_dirty_log()?)
    }

    fn pause(&self) -> Result<(), PortError> {
        match self.machine.status() {
            // One that its operator has paused, or that arrived paused, has nothing to stop and must not be started
            // afterwards.
            MachineStatus::Paused | MachineStatus::Created => {}
            MachineStatus::Running | MachineStatus::Stopped | MachineStatus::Faulted { .. } => {
                self.machine.pause()?;
                *lock(&self.paused_by_engine) = true;
            }
        }
        Ok(())
    }

    fn settle(&self) -> Result<(), PortError> {
        Ok(self.machine.flush_disks()?)
    }

    fn save(&self) -> Result<SavedState, PortError> {
        self.machine.flush_disks()?;
        let state = self.machine.save_state()?;
        Ok(SavedState { state, network: self.network(), runs: *lock(&self.paused_by_engine) })
    }

    fn let_go(&self) {
        fault::point(Step::Source(SourceStep::LetsGo));
        if let Err(error) = self.machine.let_go_of_disks() {
            tracing::error!("the target can't take over: {}", in_words(&error));
        }
        fault::point(Step::Source(SourceStep::HasLetGo));
    }

    fn resume(&self) -> Result<(), PortError> {
        self.machine.take_disks()?;
        fault::point(Step::Source(SourceStep::TookBack));
        let mut paused = lock(&self.paused_by_engine);
        if *paused {
            self.machine.run()?;
        }
        // Only now: a resumption that failed is tried again.
        *paused = false;
        Ok(())
    }

    fn release(&self) {
        self.machine.stop();
    }
}

/// Builds machines for migrations with this host's tap and serial console. A host that wants to keep the machine wraps
/// this in a [`TargetHost`] of its own.
#[derive(Debug)]
pub struct MachineHost {
    local: LocalChoices,
}

impl MachineHost {
    /// A host with these choices.
    #[must_use]
    pub fn new(local: LocalChoices) -> Self {
        Self { local }
    }

    /// Builds the empty machine that `description` asks for.
    ///
    /// # Errors
    /// A refusal that names the cause: no memory, no tap, an unknown description.
    pub fn build_machine(&self, description: &[u8]) -> Result<MigratableMachine, BuildRefusal> {
        self.make(description, Machine::build)
    }

    /// Builds the machine that `description` asks for on memory that another process's guest is using.
    ///
    /// # Errors
    /// A refusal that names the cause: no tap, an unknown description, memory that can't be trusted.
    pub fn adopt_machine(
        &self,
        description: &[u8],
        memory: OwnedFd,
    ) -> Result<MigratableMachine, BuildRefusal> {
        self.make(description, |config| Machine::build_on(config, memory))
    }

    fn make(
        &self,
        description: &[u8],
        make: impl FnOnce(&MachineConfig) -> Result<Machine, BuildError>,
    ) -> Result<MigratableMachine, BuildRefusal> {
        let cannot_build = |cause: PortError| BuildRefusal { code: AbortCode::CannotBuild, cause };
        let config = Machine::config_from_description(description, self.local.clone())
            .map_err(|error| cannot_build(error.into()))?;
        let machine = make(&config).map_err(|error| {
            let bad_memory = matches!(error, BuildError::Memory(MemoryError::HandedOver(_)));
            let no_memory = matches!(error, BuildError::Memory(_)) && !bad_memory;
            let code = if no_memory { AbortCode::NoMemory } else { AbortCode::CannotBuild };
            BuildRefusal { code, cause: error.into() }
        })?;
        machine.check_network(description).map_err(|error| cannot_build(error.into()))?;
        Ok(MigratableMachine::new(Arc::new(machine), Vec::new(), Vec::new()))
    }
}

impl TargetHost for MachineHost {
    fn build(
        &self,
        _: VmId,
        description: &[u8],
        _: &MemoryLayout,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        Ok(Arc::new(self.build_machine(description)?))
    }

    fn adopt(
        &self,
        _: VmId,
        description: &[u8],
        _: &MemoryLayout,
        memory: OwnedFd,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        Ok(Arc::new(self.adopt_machine(description, memory)?))
    }
}

impl TargetVm for MigratableMachine {
    fn pages(&self) -> Arc<dyn GuestPages> {
        SourceVm::pages(self)
    }

    fn drop_stale_frames(&self) {
        self.machine.drop_queued_frames();
    }

    fn restore(&self, state: &[u8]) -> Result<(), PortError> {
        Ok(self.machine.restore_state(state)?)
    }

    fn run(&self, runs: bool) -> Result<(), PortError> {
        self.machine.take_disks()?;
        fault::point(Step::Target(TargetStep::TookDisks));
        let started = if runs { self.machine.run() } else { Ok(()) };
        fault::point(Step::Target(TargetStep::Started));
        started.map_err(|error| {
            SourceVm::let_go(self);
            error.into()
        })
    }

    fn announce(&self, frame: &[u8]) -> io::Result<()> {
        // The guest may not speak for a while, so what is announced is remembered for its next migration.
        if let Some(mac) = self.machine.mac() {
            lock(&self.addresses).observe(mac, frame);
        }
        self.machine.send_to_network(frame)
    }

    fn discard(&self) {
        self.machine.stop();
    }
}
