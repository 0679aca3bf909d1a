//! The guest as an operator of two hosts sees it: started, received, migrated, stopped, with `ferry`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use ferry_lab::network::lab::{HOST_A_IPV4, HOST_B_IPV4, TAP, VM_IPV4, VM_MAC};
use ferry_lab::{Lab, LabClock};
use ferry_tests::process::{Host, Process};
use serde_json::Value;

use crate::agent::Agent;
use crate::back_end;

const NAME: &str = "linux";
const PORT: u16 = 4444;

/// Above what is needed: how long the guest stands still is for the benches to say.
const DOWNTIME: &str = "500ms";

/// How long the guest may take to boot: several times what it takes alone on KVM's PVM back end.
const BOOT_PATIENCE: Duration = Duration::from_secs(420);

/// The lines of the guest's console that are shown when something went wrong.
const CONSOLE_LINES: usize = 30;

/// The bytes of the guest's disk.
const DISK_BYTES: u64 = 64 << 20;

/// Which kernel, and how it finds what the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Variant {
    /// Processors in the MP table, devices on the command line, the clock of KVM.
    Mptable,
    /// All in ACPI tables, as distribution kernels have it, and the time-stamp counter as clock.
    Acpi,
}

impl Variant {
    pub(crate) const ALL: [Self; 2] = [Self::Mptable, Self::Acpi];

    /// Its name in messages and its folder among the images.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mptable => "mptable",
            Self::Acpi => "acpi",
        }
    }

    fn processors(self) -> &'static str {
        match self {
            Self::Mptable => "2",
            Self::Acpi => "1",
        }
    }

    fn acpi(self) -> &'static str {
        match self {
            Self::Mptable => "off",
            Self::Acpi => "on",
        }
    }

    fn parameters(self) -> &'static str {
        match self {
            Self::Mptable => "clocksource=kvm-clock",
            Self::Acpi => "",
        }
    }
}

/// What is run.
#[derive(Debug)]
pub(crate) struct Images {
    /// The command `ferry`.
    pub(crate) ferry: PathBuf,
    /// Where the kernels and the initramfs are.
    pub(crate) folder: PathBuf,
}

impl Images {
    /// What the guest's web server serves as `/file`.
    pub(crate) fn web_file(&self) -> anyhow::Result<Vec<u8>> {
        let path = self.folder.join("web-file");
        std::fs::read(&path).with_context(|| path.display().to_string())
    }
}

/// A guest that is somewhere.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    variant: Variant,
    hosts: [Host<'a>; 2],
    /// On which of them it is.
    at: usize,
    process: Option<Process>,
    folder: tempfile::TempDir,
}

impl<'a> Guest<'a> {
    /// Starts it on host A, without waiting for it.
    pub(crate) fn start(lab: &'a Lab, images: &Images, variant: Variant) -> anyhow::Result<Self> {
        let hosts = [&lab.host_a, &lab.host_b].map(|namespace| Host::inside(&images.ferry, namespace));
        let folder = tempfile::tempdir()?;
        std::fs::File::create(folder.path().join("disk"))?.set_len(DISK_BYTES)?;
        let mut guest = Self { variant, hosts, at: 0, process: None, folder };
        let file = |name: &str| images.folder.join(name).display().to_string();
        let kernel = file(&format!("{}/vmlinux", variant.name()));
        let net = format!("tap={TAP},mac={VM_MAC},ip={VM_IPV4}");
        let cmdline = format!(
            "console=ttyS0 panic=-1 ferry.ip={VM_IPV4} {} {}",
            variant.parameters(),
            back_end::parameters()
        );
        let (serial, disk) = (guest.serial(), guest.disk_argument());
        let mut arguments = vec!["run", "--name", NAME, "--kernel", &kernel, "--initrd"];
        let initrd = file("initramfs.cpio");
        arguments.extend([&initrd, "--cmdline", &cmdline, "--memory", "128M", "--net", &net]);
        arguments.extend(["--cpus", variant.processors(), "--serial", &serial, "--disk", &disk]);
        arguments.extend(["--acpi", variant.acpi()]);
        guest.process = Some(guest.hosts[0].hosts(&arguments));
        Ok(guest)
    }

    /// Waits until its agent answers a client of `lab`.
    pub(crate) fn until_up(&mut self, lab: &Lab, clock: LabClock) -> anyhow::Result<Agent> {
        let deadline = clock.now() + BOOT_PATIENCE;
        loop {
            match Agent::connect(&lab.client) {
                Ok(agent) => return Ok(agent),
                Err(error) if clock.now() > deadline => {
                    return Err(error.context(format!("it did not boot in {BOOT_PATIENCE:?}")));
                }
                Err(_) => {}
            }
            let lives = self.process.as_mut().is_some_and(Process::lives);
            ensure!(lives, "it ended while it booted: {:?}", self.process.take().map(Process::end));
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    /// Moves it to the other host; returns the report.
    pub(crate) fn migrate(&mut self) -> anyhow::Result<Value> {
        let (from, to) = (self.at, 1 - self.at);
        let address = format!("{}:{PORT}", [HOST_A_IPV4, HOST_B_IPV4][to]);
        let (net, serial) = (format!("tap={TAP}"), self.serial());
        let receive = ["receive", "--name", NAME, "--listen", &address, "--net", &net, "--serial", &serial];
        // Nobody else is on this network.
        let receive = [&receive[..], &["--insecure"]].concat();
        let target = self.hosts[to].hosts(&receive);
        let migrate = ["migrate", NAME, "--to", &address, "--downtime", DOWNTIME, "--insecure", "--json"];
        let said = self.hosts[from].ferry(&migrate);
        let last = said.stdout.lines().last().unwrap_or_default();
        let report: Value = serde_json::from_str(last).with_context(|| format!("no report: {said:?}"))?;
        let moved = (&report["event"], &report["digest_equal"]) == (&"moved".into(), &true.into());
        if !moved {
            bail!("it did not move: {report}");
        }
        self.hosts[to].until_state(NAME, "running");
        self.at = to;
        let source = self.process.replace(target).context("a guest that runs has a process")?.end();
        ensure!(source.code == Some(0), "the source did not end well: {source:?}");
        Ok(report)
    }

    /// Ends it: by its power button if it has one, otherwise as pulling the plug does.
    pub(crate) fn end(&mut self) -> anyhow::Result<()> {
        let verb = match self.variant {
            Variant::Mptable => "stop",
            Variant::Acpi => "shutdown",
        };
        let said = self.hosts[self.at].ferry(&[verb, NAME]);
        ensure!(said.code == Some(0), "ferry {verb}: {said:?}");
        let said = self.process.take().context("it has ended already")?.end();
        ensure!(said.code == Some(0), "its process did not end well: {said:?}");
        let pressed = self.console().contains("the power button was pressed");
        ensure!(pressed == (self.variant == Variant::Acpi), "power button pressed: {pressed}");
        Ok(())
    }

    /// The end of what its console said.
    pub(crate) fn console(&self) -> String {
        let bytes = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }

    /// Its disk's image.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn disk_argument(&self) -> String {
        format!("path={}", self.disk().display())
    }

    /// Both hosts append to one file, as only one of them runs the guest.
    fn serial(&self) -> String {
        format!("file={}", Path::new(self.folder.path()).join("console").display())
    }
}
