//! Trying a witness out before anything depends on it.

use std::sync::Arc;

use anyhow::anyhow;
use ferry_migrate::witness::{self, Witness};

/// Whether the witness answers, if there is one.
pub(crate) async fn try_out(witness: Option<&Arc<dyn Witness>>) -> anyhow::Result<()> {
    let Some(witness) = witness else { return Ok(()) };
    witness::try_out(witness).await.map_err(|reason| {
        anyhow!(reason).context(format!(
            "the witness {witness} does not answer, and no VM is moved that it could not decide about"
        ))
    })
}
