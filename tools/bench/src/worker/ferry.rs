//! ferry's source and target, each in a process of its own, on top of the library alone.
//!
//! Each gets its order as its one argument and says what happens line by line on standard output
//! ([`Said`]). The source takes one [`MoveOrder`] from standard input. Both stay until they are killed, as the
//! VMMs of the other engines do.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use ferry_migrate::machine::{MachineHost, MigratableMachine};
use ferry_migrate::ports::{RecordStore, SystemClock};
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::source::{Failure, OnTimeout, Outcome, Progress};
use ferry_migrate::protocol::{Epoch, MigrationId, VmId, VmName};
use ferry_migrate::report::MigrationReport;
use ferry_migrate::{
    BandwidthCap, FileRecords, MigrateOptions, ReceiveOptions, Receiver, Resolver, Security, Update, migrate,
};
use ferry_vmm::{
    BootSource, ClockMode, CpuModel, CpuProfile, Kernel, LocalChoices, Machine, MachineConfig, MemoryChoices,
    NetConfig, SerialTarget,
};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{mpsc, watch};

use super::{parse, say};
use crate::engine::ferry::words::{self, MoveOrder, Said, SourceOrder, TargetOrder};

/// Threads for the control plane; data streams and vCPUs have threads of their own.
const RUNTIME_THREADS: usize = 2;

const NAME: &str = "guest";

/// Runs a source.
///
/// # Errors
/// If the guest can't be booted, or the order is none.
pub fn source(order: &str) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(run_source(parse(order)?))
}

/// Runs a target.
///
/// # Errors
/// If it can't listen, or the order is none.
pub fn target(order: &str) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(run_target(parse(order)?))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(RUNTIME_THREADS).enable_all().build().context("no runtime can be had")
}

fn records(folder: &Path) -> anyhow::Result<Arc<FileRecords>> {
    std::fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    Ok(Arc::new(FileRecords::new(folder.to_owned(), name()?)))
}

fn name() -> anyhow::Result<VmName> {
    Ok(NAME.parse()?)
}

fn random_id() -> anyhow::Result<[u8; 16]> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| anyhow!("no random numbers: {error}"))?;
    Ok(id)
}

async fn run_source(order: SourceOrder) -> anyhow::Result<ExitCode> {
    let SourceOrder { kernel, initrd, cmdline, memory_mib, backing, cpus, net, serial, folder } = order;
    let config = MachineConfig {
        memory: words::memory(u64::from(memory_mib) << 20, backing),
        cpus,
        cpu: CpuModel::default(),
        net: net.map(|(tap, mac)| NetConfig { tap, mac }),
        disks: Vec::new(),
        rng: false,
        serial: SerialTarget::File(serial),
        clock: ClockMode::default(),
    };
    let machine = Arc::new(Machine::build(&config)?);
    machine.load(&BootSource { kernel: Kernel::File(kernel), initrd, cmdline, acpi: false })?;
    machine.run()?;
    let records = records(&folder)?;
    let vm = VmId(random_id()?);
    let record = Record::of_own(vm, name()?, Epoch::FIRST, Standing::Running);
    records.store(&record).map_err(|error| anyhow!(error))?;
    let machine = MigratableMachine::new(machine, Vec::new(), Vec::new());
    say(&Said::Up)?;

    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let Some(line) = lines.next_line().await? else { return Ok(ExitCode::SUCCESS) };
    // A guest that stays goes on here.
    move_away(machine.clone(), records, vm, parse(&line)?).await?;
    // Whatever it holds now is part of what is measured afterwards; the harness ends it.
    lines.next_line().await?;
    drop(machine);
    Ok(ExitCode::SUCCESS)
}

async fn move_away(
    machine: MigratableMachine,
    records: Arc<FileRecords>,
    vm: VmId,
    order: MoveOrder,
) -> anyhow::Result<()> {
    let budget = Duration::from_secs_f64(order.downtime_ms / 1e3);
    let options = MigrateOptions {
        migration: MigrationId(random_id()?),
        vm,
        name: name()?,
        epoch: Epoch::FIRST,
        target: order.target.parse()?,
        security: Security::Insecure,
        streams: order.streams.unwrap_or_else(MigrateOptions::streams_to_choose_from),
        adapt_streams: order.streams.is_none(),
        compression: words::packing(order.compression).map_err(|lacks| anyhow!(lacks))?,
        bandwidth: BandwidthCap::new(order.bandwidth_bytes_per_s),
        verify: order.verify,
        verify_whole: false,
        downtime_budget: budget,
        timeout: Duration::from_secs_f64(order.timeout_ms / 1e3),
        on_timeout: OnTimeout::Cancel,
        // A run in which the link broke is no measurement.
        reconnect: Duration::ZERO,
        witness: None,
        resolver: Resolver::default(),
    };
    let (updates, mut told) = mpsc::unbounded_channel();
    let never = watch::channel(false);
    let clock = Arc::new(SystemClock::default());
    let moving = migrate(Arc::new(machine), records, clock, options, never.1.clone(), updates);
    let telling = async {
        while let Some(update) = told.recv().await {
            if let Some(said) = in_words(update) {
                say(&said)?;
            }
        }
        anyhow::Ok(())
    };
    let (outcome, told) = tokio::join!(moving, telling);
    told?;
    match outcome? {
        Outcome::Moved(summary) => {
            let report = Box::new(MigrationReport::new(NAME, budget, &summary));
            say(&Said::Moved { report })
        }
        Outcome::LetGo { .. } => unreachable!("nobody decides anything here"),
        Outcome::Stayed { failure, .. } => {
            let timeout = matches!(failure, Failure::Timeout(_));
            say(&Said::Stayed { timeout, reason: failure.to_string() })
        }
    }
}

fn in_words(update: Update) -> Option<Said> {
    match update {
        Update::Progress(progress) => match *progress {
            Progress::RoundStarted { round, pages } => Some(Said::RoundStarted { round, pages }),
            Progress::Stopping { pages, .. } => Some(Said::Stopping { pages }),
            Progress::Handed => Some(Said::Handed),
            Progress::RoundDone(round) => Some(Said::RoundDone { round: Box::new((&round).into()) }),
            Progress::Negotiated { .. }
            | Progress::Paused
            | Progress::Reconnecting { .. }
            | Progress::Reconnected(_)
            | Progress::InDoubt { .. }
            | Progress::Undoing { .. } => None,
        },
        Update::Transferred { round_pages, .. } => Some(Said::Sent { round_pages }),
        Update::Streams(_) => None,
    }
}

async fn run_target(order: TargetOrder) -> anyhow::Result<ExitCode> {
    let TargetOrder { listen, tap, folder } = order;
    let host = MachineHost::new(LocalChoices {
        tap,
        disks: Vec::new(),
        serial: SerialTarget::Null,
        memory: MemoryChoices::default(),
        cpu: CpuProfile::default(),
    });
    let options = ReceiveOptions {
        listen: listen.parse()?,
        security: Security::Insecure,
        host: "target".to_owned(),
        name: None,
        witness: None,
    };
    let (updates, _) = mpsc::unbounded_channel();
    let clock = Arc::new(SystemClock::default());
    let mut receiver = Receiver::bind(options, Arc::new(host), records(&folder)?, clock, updates)?;
    let address = receiver.local_address()?.to_string();
    say(&Said::Listening { address })?;
    let never = watch::channel(false);
    let received = receiver.receive(never.1.clone()).await?;
    // The machine lives as long as `received`; the harness ends this process.
    let end = BufReader::new(tokio::io::stdin()).lines().next_line().await;
    drop(received);
    end?;
    Ok(ExitCode::SUCCESS)
}
