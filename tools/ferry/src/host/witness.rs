//! Trying a witness out before anything depends on it.

use std::sync::Arc;

use anyhow::anyhow;
use ferry_migrate::witness::Witness;

/// Whether the witness answers, if there is one.
pub(crate) async fn try_out(witness: Option<&Arc<dyn Witness>>) -> anyhow::Result<()> {
    let Some(witness) = witness.cloned() else { return Ok(()) };
    let name = witness.to_string();
    let tried = tokio::task::spawn_blocking(move || witness.id().and_then(|_| witness.probe())).await?;
    tried.map_err(|error| {
        anyhow!(error).context(format!(
            "the witness {name} does not answer, and no VM is moved that it could not decide about"
        ))
    })
}
