//! A host of the lab as far as ferry is concerned: its state folder, and the process that hosts the VM there.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::Namespace;
use ferry_lab::network::lab::{HOST_A_IPV4, HOST_B_IPV4, TAP, VM_IPV4, VM_MAC};
use ferry_migrate::protocol::Record;
use serde_json::Value;

use crate::plan::{Load, Side};
use crate::process::{PATIENCE, Process, wait_for};

/// The VM's name on both hosts.
pub const NAME: &str = "web";

/// Its memory in MiB.
pub const MEMORY_MIB: u32 = 64;

/// Where targets listen.
const PORT: u16 = 4444;

/// How long the control API may take to answer: a process that stands still never does.
const API_PATIENCE: Duration = Duration::from_secs(10);

/// What the guest is told to do.
fn workload(load: Load) -> String {
    match load {
        Load::Network => format!("http ip={VM_IPV4}/24 fill=16 random=100"),
        Load::Memory => "dirty rate=40 set=8 fill=16 random=100".to_owned(),
    }
}

/// A host.
#[derive(Debug)]
pub struct Host<'a> {
    /// Which end it is of the migration with the fault.
    pub side: Side,
    /// Where it is.
    pub namespace: &'a Namespace,
    /// What ferry keeps there.
    pub state: PathBuf,
    /// The process that hosts the VM or waits for it.
    pub process: Option<Process>,
    /// The folder with its certificate, if it migrates with one.
    pub(crate) certificate: Option<PathBuf>,
    program: PathBuf,
    disk: PathBuf,
}

impl<'a> Host<'a> {
    /// The host at `side`, with an empty state folder under `folder`.
    ///
    /// # Errors
    /// If the folder can't be made.
    pub fn new(
        side: Side,
        namespace: &'a Namespace,
        program: &Path,
        folder: &Path,
        disk: &Path,
    ) -> anyhow::Result<Self> {
        let state = folder.join(side.to_string());
        std::fs::create_dir(&state)?;
        let (program, disk) = (program.to_owned(), disk.to_owned());
        Ok(Self { side, namespace, state, process: None, certificate: None, program, disk })
    }

    /// Where others reach it.
    pub(crate) const fn address(&self) -> Ipv4Addr {
        match self.side {
            Side::Source => HOST_A_IPV4,
            Side::Target => HOST_B_IPV4,
        }
    }

    /// Where it takes VMs in.
    #[must_use]
    pub fn listens_on(&self) -> String {
        format!("{}:{PORT}", self.address())
    }

    /// `ferry` with these arguments on this host.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("FERRY_STATE_DIR", &self.state).env_remove("FERRY_LOG");
        command
    }

    /// Starts `ferry` with these arguments, without faults.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(&self, arguments: &[&str]) -> anyhow::Result<Process> {
        let what = format!("'ferry {}' at the {}", arguments[0], self.side);
        Process::start(&what, self.namespace, self.command(arguments))
    }

    /// Starts a process that hosts a VM, with these faults.
    fn hosts(&mut self, arguments: &[&str], faults: &str, up: &str) -> anyhow::Result<()> {
        let mut command = self.command(&[arguments, &["--json", "--exit-with-stdin"]].concat());
        command.env("FERRY_FAULT", faults);
        let what = format!("'ferry {}' at the {}", arguments[0], self.side);
        let mut process = Process::start(&what, self.namespace, command)?;
        process.until(up)?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts a guest here.
    ///
    /// # Errors
    /// What ferry says.
    pub fn run(&mut self, load: Load, has_disk: bool, faults: &str) -> anyhow::Result<()> {
        let (memory, net) = (format!("{MEMORY_MIB}M"), format!("tap={TAP},mac={VM_MAC}"));
        let (workload, disk) = (workload(load), format!("path={}", self.disk.display()));
        let mut arguments = vec!["run", "--name", NAME, "--memory", &memory, "--serial", "null"];
        arguments.extend(["--net", &net, "--guest", &workload]);
        if has_disk {
            arguments.extend(["--disk", &disk]);
        }
        self.hosts(&arguments, faults, "running")
    }

    /// Starts to wait for a guest here.
    ///
    /// # Errors
    /// What ferry says.
    pub fn receive(&mut self, faults: &str) -> anyhow::Result<()> {
        let (address, net) = (self.listens_on(), format!("tap={TAP}"));
        let receive = ["receive", "--name", NAME, "--listen", &address, "--net", &net];
        let security = self.security();
        let security: Vec<&str> = security.iter().map(String::as_str).collect();
        self.hosts(&[&receive[..], &security].concat(), faults, "listening")
    }

    /// Starts `ferry migrate` from here to `target`, whose link is made again within `reconnect`.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn migrate(&self, target: &str, reconnect: &str) -> anyhow::Result<Process> {
        // A guest that dirties little fits any budget; what is looked at here is not how long it takes.
        let migrate = ["migrate", NAME, "--to", target, "--downtime", "10s", "--timeout", "60s"];
        let streams = ["--streams", "2", "--reconnect", reconnect, "--json"];
        let security = self.security();
        let security: Vec<&str> = security.iter().map(String::as_str).collect();
        self.start(&[&migrate[..], &streams, &security].concat())
    }

    /// How its connections are secured, for the command line.
    fn security(&self) -> Vec<String> {
        match &self.certificate {
            Some(folder) => vec!["--tls-dir".to_owned(), folder.display().to_string()],
            None => vec!["--insecure".to_owned()],
        }
    }

    /// Starts `ferry migrate --cancel` here.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn cancel(&self) -> anyhow::Result<Process> {
        self.start(&["migrate", NAME, "--cancel", "--json"])
    }

    /// Runs `ferry` with these arguments to its end; gives its exit code and what it said.
    ///
    /// # Errors
    /// If it does not end.
    pub fn ferry(&self, arguments: &[&str]) -> anyhow::Result<(Option<i32>, String)> {
        let mut process = self.start(arguments)?;
        let code = process.end(PATIENCE)?.code();
        Ok((code, process.last_words()))
    }

    /// What the control API answers to a GET of `path`.
    ///
    /// # Errors
    /// That nobody answers, or what was answered instead.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(self.state.join(format!("{NAME}.sock")))?;
        stream.set_read_timeout(Some(API_PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: ferry\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            bail!("{body}");
        }
        Ok(serde_json::from_str(body)?)
    }

    /// The state of its VM by `GET /api/v1/vm`, or `None` if nobody answers.
    #[must_use]
    pub fn vm_state(&self) -> Option<String> {
        self.get("/api/v1/vm").ok()?["state"].as_str().map(str::to_owned)
    }

    /// Whether its process has ended, or there is none.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn is_down(&mut self) -> anyhow::Result<bool> {
        self.process.as_mut().map_or(Ok(true), |process| Ok(process.ended()?.is_some()))
    }

    /// Its process.
    ///
    /// # Errors
    /// If there is none.
    pub fn process(&mut self) -> anyhow::Result<&mut Process> {
        let side = self.side;
        self.process.as_mut().with_context(|| format!("no process at the {side}"))
    }

    /// All its records.
    ///
    /// # Errors
    /// If one can't be read: no crash of a process may leave that.
    pub fn records(&self) -> anyhow::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.state)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "record") {
                let record = Record::decode(&std::fs::read(&path)?);
                records.push(record.with_context(|| format!("{} is damaged", path.display()))?);
            }
        }
        Ok(records)
    }

    /// Waits until the VM is in one of `states` here.
    ///
    /// # Errors
    /// If it is not by then.
    pub fn until_state(&self, states: &[&str], patience: Duration) -> anyhow::Result<String> {
        let mut last = None;
        let waited = wait_for(&format!("the VM at the {} to be {states:?}", self.side), patience, || {
            last = self.vm_state();
            Ok(last.clone().filter(|state| states.contains(&state.as_str())))
        });
        waited.with_context(|| format!("it is {last:?}"))
    }
}
