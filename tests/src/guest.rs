//! Boots guests, migrates them within this process, and counts what a process must not leak.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ferry_guest_abi::report::{GAP_LOG_MIN_US, Stage};
use ferry_guest_abi::{REPORT_GPA, Report, Workload};
use ferry_migrate::Resolver;
use ferry_migrate::machine::{MachineHost, MigratableMachine};
use ferry_migrate::ports::{BuildRefusal, RecordStore, SystemClock, TargetHost, TargetVm};
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::source::{Failure, OnTimeout, Outcome, Summary};
use ferry_migrate::protocol::{Epoch, MemoryLayout, MigrationId, PAGE_BYTES, VmId};
use ferry_migrate::{
    BandwidthCap, FileRecords, ListenAddress, MigrateOptions, ReceiveOptions, Receiver, Security, Update,
    migrate,
};
use ferry_vmm::{
    Backing, BootSource, ClockMode, CpuModel, CpuProfile, Kernel, LocalChoices, Machine, MachineConfig,
    MemoryChoices, MemoryConfig, SerialTarget,
};
use tokio::sync::{mpsc, watch};

pub use crate::tier::one_at_a_time;

/// Whether guests can run here; if not, says so by name.
///
/// # Panics
/// Under CI, where they must.
#[must_use]
pub fn has_kvm() -> bool {
    crate::tier::has_kvm("e2e")
}

/// The identity of every test's guest.
pub const VM: VmId = VmId([7; 16]);

/// A VM somewhere, with what its host knows of it.
#[derive(Debug)]
pub struct Guest {
    /// Its machine.
    pub machine: MigratableMachine,
    /// The epoch in which it runs.
    pub epoch: Epoch,
    /// Its host's record.
    pub records: Arc<FileRecords>,
    folder: Arc<tempfile::TempDir>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.machine.machine().stop();
    }
}

/// What migrations within a test run on.
///
/// # Panics
/// If the system has no threads left.
#[must_use]
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// A migration that nobody cancels.
#[must_use]
pub fn never() -> watch::Receiver<bool> {
    watch::channel(false).1
}

/// The reason of an attempt after which the guest goes on here.
///
/// # Panics
/// If the guest was moved, or does not go on.
#[must_use]
pub fn stayed(guest: &Guest, outcome: Outcome) -> Failure {
    match outcome {
        Outcome::Stayed { failure, .. } => {
            guest.goes_on();
            failure
        }
        Outcome::Moved(_) | Outcome::LetGo { .. } => panic!("the guest was moved"),
    }
}

/// A machine without a network.
#[must_use]
pub fn config(memory_mib: u64, cpus: u8, backing: Backing) -> MachineConfig {
    MachineConfig {
        memory: MemoryConfig::new(memory_mib << 20, backing),
        cpus,
        cpu: CpuModel::default(),
        net: None,
        disks: Vec::new(),
        rng: false,
        serial: SerialTarget::Null,
        clock: ClockMode::default(),
    }
}

/// Boots the workload guest and waits until it does its job.
///
/// # Panics
/// If it does not come up.
#[must_use]
pub fn boot(workload: &str, config: &MachineConfig) -> Guest {
    boot_logging_gaps(workload, config, GAP_LOG_MIN_US)
}

/// The same, with a log of every gap between two heartbeats from a length on.
///
/// # Panics
/// If it does not come up.
#[must_use]
pub fn boot_logging_gaps(workload: &str, config: &MachineConfig, gap_log_us: u64) -> Guest {
    let workload = Workload::parse(workload).expect("a workload");
    let machine = Machine::build(config).expect("a machine");
    machine
        .load(&BootSource {
            kernel: Kernel::Image { name: "workload guest", bytes: ferry_guest_image::WORKLOAD_GUEST },
            initrd: None,
            cmdline: format!("gap_log_us={gap_log_us} workload {workload}"),
            // The workload guest has none.
            acpi: false,
        })
        .expect("it boots");
    machine.run().expect("it runs");
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let records = records_of(&folder, 0);
    let epoch = Epoch::FIRST;
    let name = "guest".parse().expect("a name");
    records.store(&Record::of_own(VM, name, epoch, Standing::Running)).expect("a record");
    let machine = MigratableMachine::new(Arc::new(machine), Vec::new(), Vec::new());
    let guest = Guest { machine, epoch, records, folder };
    for _ in 0..600 {
        if guest.report().is_some_and(|report| report.stage == Stage::Ready) {
            return guest;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("the guest is not ready after 30 s: {:?}", guest.report());
}

impl Guest {
    /// What the guest says of itself.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        let ram = self.machine.machine().ram();
        let mut bytes = [0; PAGE_BYTES];
        ram.read_page(ram.page_of_gpa(REPORT_GPA)?, &mut bytes).ok()?;
        Report::parse(&bytes).ok()
    }

    /// The report of a guest that is well.
    ///
    /// # Panics
    /// If it is not.
    #[must_use]
    pub fn healthy(&self) -> Report {
        let report = self.report().expect("the guest reports");
        assert_eq!(report.errors, 0, "the guest found its memory changed: {:?}", report.first_bad);
        assert_eq!(report.fault, None);
        report
    }

    /// Waits until the guest has had a few heartbeats more, and is well.
    ///
    /// # Panics
    /// If it has none.
    pub fn goes_on(&self) -> Report {
        let before = self.healthy().heartbeat_count;
        for _ in 0..200 {
            std::thread::sleep(Duration::from_millis(10));
            if self.healthy().heartbeat_count > before + 5 {
                return self.healthy();
            }
        }
        panic!("no heartbeat in 2 s after {before}: {:?}", self.machine.machine().status());
    }

    /// Generous options for moving it to `target`.
    ///
    /// # Panics
    /// If `target` names none.
    #[must_use]
    pub fn options(&self, target: String) -> MigrateOptions {
        let mut id = [0; 16];
        id[0] = u8::try_from(self.epoch.number() % 256).expect("below 256");
        MigrateOptions {
            migration: MigrationId(id),
            vm: VM,
            name: "guest".parse().expect("a name"),
            epoch: self.epoch,
            target: target.parse().expect("an endpoint"),
            security: Security::LoopbackOnly,
            streams: 1,
            adapt_streams: false,
            compression: Compression::None,
            bandwidth: BandwidthCap::default(),
            verify: true,
            verify_whole: false,
            // Far above what is needed: these tests are about correctness on a shared machine.
            downtime_budget: Duration::from_millis(500),
            timeout: Duration::from_secs(120),
            on_timeout: OnTimeout::Cancel,
            reconnect: Duration::from_secs(30),
            witness: None,
            resolver: Resolver::default(),
        }
    }

    /// Records for the next host of this guest.
    fn next_records(&self) -> Arc<FileRecords> {
        records_of(&self.folder, self.epoch.number() % 2)
    }
}

/// The records of one of two hosts.
fn records_of(folder: &tempfile::TempDir, host: u64) -> Arc<FileRecords> {
    let name = format!("host{host}").parse().expect("a name");
    Arc::new(FileRecords::new(folder.path().to_owned(), name))
}

/// A host that remembers the machine it has built.
struct KeepingHost {
    machines: MachineHost,
    built: Arc<Mutex<Option<MigratableMachine>>>,
}

impl KeepingHost {
    fn keep(&self, machine: MigratableMachine) -> Arc<dyn TargetVm> {
        *self.built.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine.clone());
        Arc::new(machine)
    }
}

impl TargetHost for KeepingHost {
    fn build(
        &self,
        _: VmId,
        description: &[u8],
        _: &MemoryLayout,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        let machine = self.machines.build_machine(description)?;
        Ok(self.keep(machine))
    }

    fn adopt(
        &self,
        _: VmId,
        description: &[u8],
        _: &MemoryLayout,
        memory: OwnedFd,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        let machine = self.machines.adopt_machine(description, memory)?;
        Ok(self.keep(machine))
    }
}

/// A receiver on this host.
#[derive(Debug)]
pub struct Target {
    /// Takes the guest in.
    pub receiver: Receiver,
    /// Where it listens.
    pub address: String,
    /// The record of the host that it will be.
    pub records: Arc<FileRecords>,
    built: Arc<Mutex<Option<MigratableMachine>>>,
}

/// An empty host for `guest`, within the current runtime.
///
/// # Panics
/// If it can't listen.
#[must_use]
pub fn target_for(guest: &Guest) -> Target {
    target_with(guest, MemoryChoices::default())
}

/// The same, with memory of a kind that it chooses.
///
/// # Panics
/// If it can't listen.
#[must_use]
pub fn target_with(guest: &Guest, memory: MemoryChoices) -> Target {
    target_at(guest, tcp(), Security::LoopbackOnly, memory)
}

fn tcp() -> ListenAddress {
    ListenAddress::Tcp("127.0.0.1:0".parse().expect("an address"))
}

/// An empty host for `guest` that lets in whom `security` does, within the current runtime.
///
/// # Panics
/// If it can't listen.
#[must_use]
pub fn secured_target_for(guest: &Guest, security: Security) -> Target {
    target_at(guest, tcp(), security, MemoryChoices::default())
}

/// An empty host for `guest` to which its memory is handed over, within the current runtime.
///
/// # Panics
/// If it can't listen.
#[must_use]
pub fn local_target_for(guest: &Guest) -> Target {
    let listen = ListenAddress::Unix(guest.folder.path().join("socket"));
    target_at(guest, listen, Security::LoopbackOnly, MemoryChoices::default())
}

fn target_at(guest: &Guest, listen: ListenAddress, security: Security, memory: MemoryChoices) -> Target {
    let built: Arc<Mutex<Option<MigratableMachine>>> = Arc::default();
    let local = LocalChoices {
        tap: None,
        disks: Vec::new(),
        serial: SerialTarget::Null,
        memory,
        cpu: CpuProfile::default(),
    };
    let host = KeepingHost { machines: MachineHost::new(local), built: Arc::clone(&built) };
    let records = guest.next_records();
    let options = ReceiveOptions { listen, security, host: "target".into(), name: None, witness: None };
    let (updates, _) = mpsc::unbounded_channel();
    let clock = Arc::new(SystemClock::default());
    let receiver = Receiver::bind(options, Arc::new(host), Arc::clone(&records) as _, clock, updates)
        .expect("a listener");
    let address = receiver.local_address().expect("an address").to_string();
    Target { receiver, address, records, built }
}

/// Runs only the source's side of a migration.
///
/// # Panics
/// If no thread can be started.
pub async fn source(guest: &Guest, options: MigrateOptions, cancel: watch::Receiver<bool>) -> Outcome {
    let (updates, _) = mpsc::unbounded_channel();
    source_with(guest, options, cancel, updates).await
}

/// The same, with what it tells meanwhile.
///
/// # Panics
/// If no thread can be started.
pub async fn source_with(
    guest: &Guest,
    options: MigrateOptions,
    cancel: watch::Receiver<bool>,
    updates: mpsc::UnboundedSender<Update>,
) -> Outcome {
    let clock = Arc::new(SystemClock::default());
    let vm = Arc::new(guest.machine.clone());
    let records = Arc::clone(&guest.records) as _;
    migrate(vm, records, clock, options, cancel, updates).await.expect("threads")
}

/// Migrates a guest to a new machine and checks digests and records.
///
/// # Panics
/// If anything is not as it should be.
pub async fn move_guest(guest: Guest, change: impl FnOnce(&mut MigrateOptions)) -> (Guest, Summary) {
    move_guest_to(guest, MemoryChoices::default(), change).await
}

/// The same, to memory of a kind that the target chooses.
///
/// # Panics
/// If anything is not as it should be.
pub async fn move_guest_to(
    guest: Guest,
    memory: MemoryChoices,
    change: impl FnOnce(&mut MigrateOptions),
) -> (Guest, Summary) {
    let target = target_with(&guest, memory);
    move_to(guest, target, change).await
}

/// Hands a guest over to a new machine on the same memory, and checks records.
///
/// # Panics
/// If anything is not as it should be.
pub async fn move_locally(guest: Guest, change: impl FnOnce(&mut MigrateOptions)) -> (Guest, Summary) {
    let target = local_target_for(&guest);
    move_to(guest, target, change).await
}

/// Migrates a guest to a new machine, over the way that `through` makes to its address.
///
/// # Panics
/// If anything is not as it should be.
pub async fn move_guest_through(
    guest: Guest,
    through: impl FnOnce(&str) -> String,
    change: impl FnOnce(&mut MigrateOptions),
) -> (Guest, Summary) {
    let target = target_for(&guest);
    let target = Target { address: through(&target.address), ..target };
    move_to(guest, target, change).await
}

/// Migrates a guest to `target`, which was made for it, and checks digests and records.
///
/// # Panics
/// If anything is not as it should be.
pub async fn move_to(
    guest: Guest,
    mut target: Target,
    change: impl FnOnce(&mut MigrateOptions),
) -> (Guest, Summary) {
    let mut options = guest.options(target.address.clone());
    change(&mut options);
    let never = watch::channel(false);
    let moving = async {
        match source(&guest, options, never.1.clone()).await {
            Outcome::Moved(summary) => *summary,
            // Said here and now: a target whose source has gone silently would be waited for without a word.
            Outcome::Stayed { failure, .. } => panic!("the guest was not moved: {failure}"),
            Outcome::LetGo { .. } => panic!("nobody has decided anything"),
        }
    };
    let (summary, received) = tokio::join!(moving, target.receiver.receive(never.1.clone()));
    received.expect("threads").expect("a guest");
    assert_eq!(summary.digest, summary.target_digest);
    let machine = target.built.lock().unwrap_or_else(PoisonError::into_inner).take().expect("it was built");
    let moved = Guest {
        machine,
        epoch: summary.epoch,
        records: Arc::clone(&target.records),
        folder: Arc::clone(&guest.folder),
    };
    let record = moved.records.load(VM).expect("a record").expect("a record");
    assert_eq!((record.epoch, record.standing), (summary.epoch, Standing::Running));
    let left = guest.records.load(VM).expect("a record").expect("a record");
    assert!(matches!(left.standing, Standing::Released { .. }), "{left:?}");
    (moved, summary)
}

/// What a process holds that it could leak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its threads.
    pub threads: usize,
    /// What its descriptors are, without numbers.
    pub files: Vec<String>,
    /// How many mappings it has.
    pub mappings: usize,
}

impl Held {
    /// What this process holds now.
    ///
    /// # Panics
    /// Without /proc.
    #[must_use]
    pub fn now() -> Self {
        let count = |path: &str| fs::read_dir(path).map(Iterator::count).unwrap_or_default();
        let mut files: Vec<String> = fs::read_dir("/proc/self/fd")
            .expect("/proc")
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|link| link.display().to_string())
            // Sockets and the folder being read have numbers that change.
            .map(|link| link.split(':').next().unwrap_or_default().to_owned())
            .collect();
        files.sort();
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        Self { threads: count("/proc/self/task"), files, mappings: maps.lines().count() }
    }
}
