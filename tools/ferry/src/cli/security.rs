//! What the command line says of TLS.

use std::path::PathBuf;

use clap::Args;

/// Of a process that hosts a VM.
#[derive(Debug, Args)]
pub(crate) struct TlsArgs {
    /// The folder with this host's certificate for migrations: ca.pem, host.pem and host.key, as 'ferry cert' makes them. By
    /// default $FERRY_TLS_DIR, or /etc/ferry/tls if there is such a folder
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
}

/// Of one end of a migration.
#[derive(Debug, Args)]
pub(crate) struct SecurityArgs {
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Go without TLS, on any network: whoever reaches it can offer VMs, and read and change what is migrated. Without this
    /// and without a certificate only loopback is used
    #[arg(long, conflicts_with = "tls_dir")]
    pub(crate) insecure: bool,
}
