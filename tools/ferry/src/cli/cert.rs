//! `ferry cert`: a certificate authority for sites that have none, and the certificates of its hosts.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use ferry_migrate::tls::identity::{Role, VmPattern};
use ferry_migrate::tls::is_address;

use super::Output;

/// Where an authority is kept if nothing else is said.
const CA_FOLDER: &str = "ferry-ca";

#[derive(Debug, Subcommand)]
pub(crate) enum CertCommand {
    /// Make the site's authority: a certificate for all hosts, and a key that stays where it is
    Init(CertInitArgs),
    /// Issue a host's certificate, in a folder that is ready to be copied there
    Issue(CertIssueArgs),
    /// Show what a host's certificate says, and whether peers would take it
    Show(CertShowArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CertInitArgs {
    /// The folder to make
    #[arg(long, value_name = "DIR", default_value = CA_FOLDER)]
    pub(crate) dir: PathBuf,
    /// What the authority is called in its certificate
    #[arg(long, default_value = "ferry site")]
    pub(crate) name: String,
    /// For how many days it is valid
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub(crate) days: u32,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct CertIssueArgs {
    /// The host's name; sources may connect to it by this name
    #[arg(value_name = "HOST", value_parser = address)]
    pub(crate) host: String,
    /// What else sources may connect to it by: its addresses and other names
    #[arg(long = "address", value_name = "IP|NAME", value_parser = address)]
    pub(crate) addresses: Vec<String>,
    /// What the host may do with VMs
    #[arg(long, value_enum, default_value_t = RolesArg::Both)]
    pub(crate) role: RolesArg,
    /// Which VMs, by name, '*' standing for any characters; as often as needed. All of them if not said
    #[arg(long = "vm", value_name = "PATTERN")]
    pub(crate) vms: Vec<VmPattern>,
    /// For how many days it is valid, at most until the authority's own end
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub(crate) days: u32,
    /// The authority's folder
    #[arg(long, value_name = "DIR", default_value = CA_FOLDER)]
    pub(crate) ca: PathBuf,
    /// The folder to make, by default HOST in the authority's folder
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct CertShowArgs {
    /// The host's folder, by default $FERRY_TLS_DIR or /etc/ferry/tls
    #[arg(value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RolesArg {
    /// Send VMs away
    Source,
    /// Take VMs in
    Target,
    /// Both
    Both,
}

impl RolesArg {
    pub(crate) const fn roles(self) -> &'static [Role] {
        match self {
            Self::Source => &[Role::Source],
            Self::Target => &[Role::Target],
            Self::Both => &Role::ALL,
        }
    }
}

impl CertCommand {
    pub(crate) const fn output(&self) -> Output {
        match self {
            Self::Init(CertInitArgs { output, .. })
            | Self::Issue(CertIssueArgs { output, .. })
            | Self::Show(CertShowArgs { output, .. }) => *output,
        }
    }
}

/// What a source can connect to; the host's name also names a folder, and stands in commands.
fn address(text: &str) -> Result<String, String> {
    if is_address(text) {
        Ok(text.to_owned())
    } else {
        Err("take an IP address, or a name as in DNS: letters, digits, hyphens and dots, no '*'. Sources connect to it, and it \
             stands in the certificate"
            .to_owned())
    }
}
