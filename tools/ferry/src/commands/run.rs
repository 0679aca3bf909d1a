//! `ferry run`: builds a machine, boots it and stays with it.

use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use ferry_guest_abi::Workload;
use ferry_migrate::FileRecords;
use ferry_migrate::machine::MigratableMachine;
use ferry_migrate::ports::RecordStore;
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::{Epoch, VmId};
use ferry_vmm::{BootSource, ClockMode, CpuModel, Kernel, Machine, MachineConfig, NetConfig, SerialTarget};

use super::{Signals, err, exit_with_stdin, out, say_leaks, stay};
use crate::cli::{ClockArg, DiskArg, NetArg, RunArgs, SwitchArg, serial_target};
use crate::host::migration::random_id;
use crate::host::opener::Opener;
use crate::host::{Here, Life, VmHost, console, server, witness};
use crate::quantity::show_bytes;
use crate::security;
use crate::state_dir::StateDir;
use crate::terminal::{Mode, Terminal};

pub(crate) async fn run(args: RunArgs, opener: Opener) -> anyhow::Result<ExitCode> {
    if args.exit_with_stdin {
        exit_with_stdin();
    }
    let state = StateDir::from_environment()?;
    let _lock = state.claim(&args.name)?;
    let records = state.records(&args.name);
    refuse_if_in_doubt(&records, args.name.as_str())?;
    let vm = VmId(random_id().map_err(|refused| anyhow!(refused.0))?);
    let config = config(&args, vm);
    let boot = boot_source(&args)?;
    let serial = config.serial.clone();

    let build = move || -> anyhow::Result<Machine> {
        let machine = Machine::build(&config)?;
        machine.load(&boot)?;
        Ok(machine)
    };
    // The opener is dropped with the closure: nothing more is opened.
    let machine = tokio::task::spawn_blocking(move || opener.open(build)).await???;
    console::serve(&machine, &console::bind(&state, &args.name)?);
    // From before the guest can ask for anything to when this returns, however it does.
    let _terminal = keys_of_the_terminal(&serial)?;
    let (ipv4, ipv6) = addresses(args.net.as_ref());
    let machine = MigratableMachine::new(Arc::new(machine), ipv4, ipv6);
    let epoch = Epoch::FIRST;
    let record = Record::of_own(vm, args.name.clone(), epoch, Standing::Running);

    let tap = args.net.as_ref().map(|net| net.tap.clone());
    let here = Here { machine: machine.clone(), vm, epoch, tap, migration: None };
    let host = VmHost::new(args.name, records, args.witness.open(), Life::Here(Box::new(here)));
    if let Some(folder) = security::folder(args.tls.tls_dir) {
        // Told now rather than when the VM is to move.
        security::load(&folder)?;
        let _ = host.tls_folder.set(std::path::absolute(folder)?);
    }
    if let Err(error) = witness::try_out(host.witness.as_ref()).await {
        // The guest can do without it until it is to move.
        tracing::warn!("{error:#}");
    }
    let signals = Signals::watch()?;
    let listener = server::bind(&state, &host)?;
    // Last of all that may fail before the guest runs: whoever finds the record takes it for one that did.
    host.records.store(&record).map_err(|error| anyhow!(error))?;
    let server = tokio::spawn(server::serve(Arc::clone(&host), listener));
    let runner = Arc::clone(machine.machine());
    if let Err(error) = tokio::task::spawn_blocking(move || runner.run()).await? {
        host.records
            .store(&Record { standing: Standing::Stopped, ..record })
            .map_err(|error| anyhow!(error))?;
        return Err(error.into());
    }
    host.watch(&machine);
    say_leaks(&machine);
    say_running(&host, args.output.json)?;
    let code = stay(host, signals, args.output.json).await?;
    server.await??;
    Ok(code)
}

/// Has keys reach a guest whose serial port is this terminal one by one, and Ctrl-C this process.
fn keys_of_the_terminal(serial: &SerialTarget) -> anyhow::Result<Option<Terminal>> {
    if *serial != SerialTarget::Stdio {
        return Ok(None);
    }
    Terminal::enter(Mode::Keys).context("can't set the terminal's mode")
}

/// A VM of this name whose handover is undecided must not be started a second time.
fn refuse_if_in_doubt(records: &FileRecords, name: &str) -> anyhow::Result<()> {
    let records = records.all().with_context(|| {
        format!("'{name}' is in doubt; once you know that no other host runs it, 'ferry resolve {name} --discard' sets the record aside")
    })?;
    for Record { epoch, standing, .. } in records {
        if let Standing::Committed { target } = standing {
            bail!(
                "'{name}' is in doubt: epoch {epoch} of it was handed to {target}, which may run it; \
                 'ferry resolve {name} --discard' leaves it to that host, once you know what has become of it there; or take \
                 another --name"
            );
        }
    }
    Ok(())
}

fn config(args: &RunArgs, vm: VmId) -> MachineConfig {
    let net = args.net.as_ref().map(|net| NetConfig {
        tap: net.tap.clone(),
        // Locally administered, and as good as unique by the VM's random identity.
        mac: net.mac.unwrap_or([0x02, 0xfe, vm.0[0], vm.0[1], vm.0[2], vm.0[3]]),
    });
    MachineConfig {
        memory: args.memory,
        cpus: args.cpus,
        cpu: CpuModel::Profile(args.cpu.clone()),
        net,
        disks: args.disks.iter().map(DiskArg::config).collect(),
        rng: args.rng == SwitchArg::On,
        serial: serial_target(&args.serial, args.exit_with_stdin),
        clock: match args.clock {
            ClockArg::Realtime => ClockMode::Realtime,
            ClockArg::Monotonic => ClockMode::Monotonic,
        },
    }
}

fn boot_source(args: &RunArgs) -> anyhow::Result<BootSource> {
    let (kernel, cmdline) = match (&args.kernel, &args.guest) {
        (Some(path), _) => (Kernel::File(path.clone()), args.cmdline.clone()),
        (None, Some(words)) => {
            let workload = Workload::parse(words).map_err(|error| anyhow!("--guest '{words}': {error}"))?;
            let image = ferry_guest_image::WORKLOAD_GUEST;
            let kernel = Kernel::Image { name: "workload guest", bytes: image };
            let word = ferry_guest_abi::cmdline::WORKLOAD_WORD;
            (kernel, format!("{} {word} {workload}", args.cmdline).trim().to_owned())
        }
        (None, None) => bail!("one of --kernel and --guest is needed"),
    };
    // The workload guest has no ACPI, and finds its devices on its command line.
    let acpi = args.kernel.is_some() && args.acpi == SwitchArg::On;
    Ok(BootSource { kernel, initrd: args.initrd.clone(), cmdline, acpi })
}

fn addresses(net: Option<&NetArg>) -> (Vec<std::net::Ipv4Addr>, Vec<std::net::Ipv6Addr>) {
    let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
    for ip in net.iter().flat_map(|net| &net.ips) {
        match ip {
            IpAddr::V4(ip) => ipv4.push(*ip),
            IpAddr::V6(ip) => ipv6.push(*ip),
        }
    }
    (ipv4, ipv6)
}

fn say_running(host: &VmHost, json: bool) -> anyhow::Result<()> {
    let info = host.info();
    if json {
        let mut value = serde_json::to_value(&info)?;
        value["event"] = "running".into();
        out(&value);
    } else {
        err(format_args!(
            "{}: running, {} vCPU, {}; stop it with 'ferry stop {}' or Ctrl-C",
            info.name,
            info.cpus.unwrap_or_default(),
            show_bytes(info.memory_bytes.unwrap_or_default()),
            info.name,
        ));
        if let Some(terminal) = info.terminal {
            err(format_args!("{}: its serial port is the terminal {terminal}", info.name));
        }
    }
    Ok(())
}
