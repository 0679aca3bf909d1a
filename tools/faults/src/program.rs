//! The `ferry` that has fault points: built when it is needed, beside the one that has none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// What only a program with fault points contains.
const MARK: &[u8] = b"FERRY_FAULT";

/// Builds it, and says where it is.
///
/// # Errors
/// If it can't be built, or has no fault points all the same.
pub fn with_fault_points() -> anyhow::Result<PathBuf> {
    let name = "ferry-with-fault-points";
    let arguments = ["build", "--package", "ferry", "--features", "fault-points", "--bin", name];
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).args(["--message-format", "json-render-diagnostics"]).current_dir(root());
    command.stdin(Stdio::null()).stderr(Stdio::inherit());
    let said = command.output().context("cargo can't be run")?;
    if !said.status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    let messages = said.stdout.split(|byte| *byte == b'\n');
    let messages = messages.filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let built = messages.filter(|message| message["target"]["name"] == name);
    let program = built.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back();
    let program = program.context("cargo does not say where the program is")?;
    if !has_fault_points(&program)? {
        bail!("{} has no fault points", program.display());
    }
    Ok(program)
}

/// Whether the program at `path` has fault points.
///
/// # Errors
/// If it can't be read.
pub fn has_fault_points(path: &Path) -> anyhow::Result<bool> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(bytes.windows(MARK.len()).any(|window| window == MARK))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tools/faults lies two folders deep")
}
