//! Host processes of the demo: `ferry run` and `ferry receive`, started as a user would start them.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_lab::Namespace;
use ferry_migrate::protocol::VmName;

use crate::state_dir::StateDir;

/// A running host process. Dropping it ends it.
pub(super) struct HostProcess {
    child: Child,
    pub(super) state: StateDir,
    pub(super) name: VmName,
    /// What it said when it was up.
    pub(super) first_event: serde_json::Value,
}

impl HostProcess {
    /// Starts `ferry` with `arguments` and its state in `folder`, inside `namespace` if there is one, and waits
    /// until it says that it is up.
    pub(super) async fn start(
        arguments: &[&str],
        folder: &Path,
        namespace: Option<&Namespace>,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where is this program?")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(["--json", "--exit-with-stdin"])
            .env("FERRY_STATE_DIR", folder)
            // Certificates of this host are not for the demo's.
            .env("FERRY_TLS_DIR", "")
            // Its standard input is a pipe from here, which closes with this process however that ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A Ctrl-C is for the demo alone, which then ends its hosts itself.
            .process_group(0);
        let mut child = match namespace {
            Some(namespace) => namespace.spawn(command),
            None => command.spawn(),
        }
        .context("a host process can't be started")?;
        let stdout = child.stdout.take().context("a pipe is missing")?;
        let stderr = child.stderr.take().context("a pipe is missing")?;
        let mut host = Self {
            child,
            state: StateDir::at(folder),
            name: super::NAME.parse()?,
            first_event: serde_json::Value::Null,
        };
        let first = tokio::task::spawn_blocking(move || {
            let mut lines = BufReader::new(stdout).lines();
            let first = lines.next();
            // Keep reading, so that it can always write.
            std::thread::spawn(move || lines.map_while(Result::ok).count());
            first
        });
        let complaints = tokio::task::spawn_blocking(move || {
            let lines: Vec<String> = BufReader::new(stderr).lines().map_while(Result::ok).collect();
            lines.join("; ")
        });
        match tokio::time::timeout(Duration::from_secs(30), first).await??.transpose()? {
            Some(line) => {
                host.first_event = serde_json::from_str(&line)?;
                if let Some(error) = host.first_event.get("error") {
                    bail!("{}", error.as_str().unwrap_or("a host process failed"));
                }
                Ok(host)
            }
            None => bail!("a host process ended at once: {}", complaints.await?),
        }
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        // A child of ours that is not waited for yet keeps its process id, so no other process can be hit.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
