//! Certificates for both hosts of a trial, as an operator makes them: by `ferry cert`.

use std::path::Path;

use anyhow::{Context, bail};

use crate::host::Host;

/// Makes an authority in `folder`, and has `hosts` migrate with certificates of it.
pub(crate) fn certify(hosts: [&mut Host<'_>; 2], folder: &Path) -> anyhow::Result<()> {
    let ca = folder.join("ca");
    let ca = ca.to_str().context("a path in UTF-8")?;
    tell(hosts[0], &["cert", "init", "--dir", ca])?;
    for host in hosts {
        let (name, address) = (host.side.to_string(), host.address().to_string());
        tell(host, &["cert", "issue", &name, "--address", &address, "--ca", ca])?;
        host.certificate = Some(Path::new(ca).join(name));
    }
    Ok(())
}

fn tell(host: &Host<'_>, arguments: &[&str]) -> anyhow::Result<()> {
    let (code, said) = host.ferry(arguments)?;
    if code != Some(0) {
        bail!("{arguments:?}: {said}");
    }
    Ok(())
}
