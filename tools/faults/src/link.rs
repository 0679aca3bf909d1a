//! Cuts the link between the two hosts of a lab, and mends it.
//!
//! A cable that is pulled shows at the interface. Frames that are lost silently, and only one way, are what a switch with a
//! fault does: its port lets nothing out, by a token bucket that is smaller than any frame.

use std::process::{Command, Stdio};

use anyhow::bail;
use ferry_lab::{Lab, SwitchPort};

use crate::plan::Cut;

fn tc(lab: &Lab, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("tc");
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let said = lab.switch.spawn(command)?.wait_with_output()?;
    if !said.status.success() {
        bail!("tc {}: {}", arguments.join(" "), String::from_utf8_lossy(&said.stderr).trim());
    }
    Ok(())
}

fn lets_nothing_out(lab: &Lab, port: SwitchPort) -> anyhow::Result<()> {
    let bucket = ["root", "tbf", "rate", "8bit", "burst", "10", "limit", "10"];
    tc(lab, &[&["qdisc", "replace", "dev", port.interface()][..], &bucket].concat())
}

fn lets_out(lab: &Lab, port: SwitchPort) -> anyhow::Result<()> {
    tc(lab, &["qdisc", "del", "dev", port.interface(), "root"])
}

/// Cuts it.
///
/// # Errors
/// If the kernel refuses.
pub fn cut(lab: &Lab, how: Cut) -> anyhow::Result<()> {
    match how {
        Cut::CableOfSource => lab.unplug(SwitchPort::HostA)?,
        Cut::CableOfTarget => lab.unplug(SwitchPort::HostB)?,
        Cut::TowardsTarget => lets_nothing_out(lab, SwitchPort::HostB)?,
        Cut::TowardsSource => lets_nothing_out(lab, SwitchPort::HostA)?,
        Cut::BothWays => {
            lets_nothing_out(lab, SwitchPort::HostA)?;
            lets_nothing_out(lab, SwitchPort::HostB)?;
        }
    }
    Ok(())
}

/// Mends it, and waits until frames pass.
///
/// # Errors
/// If the kernel refuses, or no frame passes.
pub fn mend(lab: &Lab, how: Cut) -> anyhow::Result<()> {
    match how {
        Cut::CableOfSource => lab.replug(SwitchPort::HostA)?,
        Cut::CableOfTarget => lab.replug(SwitchPort::HostB)?,
        Cut::TowardsTarget => lets_out(lab, SwitchPort::HostB)?,
        Cut::TowardsSource => lets_out(lab, SwitchPort::HostA)?,
        Cut::BothWays => {
            lets_out(lab, SwitchPort::HostA)?;
            lets_out(lab, SwitchPort::HostB)?;
        }
    }
    Ok(())
}
