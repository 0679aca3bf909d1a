//! The socket at which `ferry console` finds the VM's serial port, whatever else the port is connected to.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use anyhow::Context;
use ferry_migrate::protocol::VmName;
use ferry_vmm::Machine;

use crate::state_dir::StateDir;

/// Only the user who hosts the VM may type.
const MODE: u32 = 0o600;

/// Listens at `name`'s socket. The file goes with the name's lock.
pub(crate) fn bind(state: &StateDir, name: &VmName) -> anyhow::Result<UnixListener> {
    let path = state.console(name);
    let context = || format!("can't make the console socket {}", path.display());
    let listener = UnixListener::bind(&path).with_context(context)?;
    fs::set_permissions(&path, Permissions::from_mode(MODE)).with_context(context)?;
    Ok(listener)
}

/// Has `machine` serve the consoles that connect. A VM must run even if this fails.
pub(crate) fn serve(machine: &Machine, listener: &UnixListener) {
    let served = listener.try_clone().and_then(|listener| machine.serve_console(listener));
    if let Err(error) = served {
        tracing::warn!(%error, "'ferry console' will not reach this VM");
    }
}
