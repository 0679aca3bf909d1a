//! What this host's record has to say to a VM that comes: whether it may be taken in at all.

use crate::ident::{Epoch, VmName};
use crate::message::{AbortCode, Hello};
use crate::record::{Record, Standing};

/// Why a VM is not taken in, by what this host knows of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Known {
    /// What runs at the source is older than what is known here, or there twice.
    #[error(
        "this host's record says that VM '{name}' is {standing} here in epoch {known}: what the source runs as epoch {epoch} is \
         outdated or a second copy"
    )]
    Outdated { name: VmName, standing: &'static str, known: Epoch, epoch: Epoch },
    /// Certificates may speak of VMs by name, so a record is only replaced under the name that it has.
    #[error(
        "this host knows this VM as '{known}', not as '{name}': if it was renamed on its way, receive it under that name \
         ('ferry receive --name {name}'); what is known of '{known}' stays as it is"
    )]
    OtherName { name: VmName, known: VmName },
}

impl Known {
    /// What the source is told beside the sentence.
    pub(super) const fn code(&self) -> AbortCode {
        match self {
            Self::Outdated { .. } => AbortCode::Epoch,
            Self::OtherName { .. } => AbortCode::Forbidden,
        }
    }
}

/// Whether the VM that comes with `hello` may be taken in, by `record`.
pub(super) fn check(record: Option<&Record>, hello: &Hello) -> Result<(), Known> {
    let Some(record) = record.filter(|record| record.vm == hello.vm) else { return Ok(()) };
    if record.name != hello.name {
        return Err(Known::OtherName { name: hello.name.clone(), known: record.name.clone() });
    }
    let outdated = match record.standing {
        // An attempt that was given up leaves the source in the epoch before.
        Standing::Receiving { .. } | Standing::Discarded => record.epoch > hello.epoch.next(),
        // What this host gave away may come back from whoever runs it now.
        Standing::Committed { .. } | Standing::Released { .. } => record.epoch > hello.epoch,
        // An epoch has one owner: what ran here in it can't run at the source.
        Standing::Running | Standing::Stopped => record.epoch >= hello.epoch,
    };
    if !outdated {
        return Ok(());
    }
    let (standing, known) = (record.standing.word(), record.epoch);
    Err(Known::Outdated { name: hello.name.clone(), standing, known, epoch: hello.epoch })
}
