//! Witnesses: a third place that decides once who has a VM whose handover is in doubt. What is decided is
//! [`ferry_protocol::witness`]'s; what stands here is how a decision is kept.
//!
//! - none: nobody decides but the two sides and the operator;
//! - [`mod@file`]: a folder on storage that both hosts mount;
//! - `etcd`: an etcd cluster that both hosts reach; built only with the feature of that name.

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod file;
mod folder;
pub(crate) mod patience;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::WitnessId;
use ferry_protocol::witness::{Claim, Ruling};

use crate::ports::PortError;
#[cfg(feature = "etcd")]
use etcd::EtcdWitness;
use file::FileWitness;
pub use patience::try_out;

/// How long is waited for an answer of a witness before it counts as silent. Longer than what a witness that is within reach takes at
/// its worst: the lock of [`mod@file`] and the cluster of `etcd` may take 2 s.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// A place that both sides of a migration reach, and that decides each claim once. Its name is what it displays.
///
/// All methods may block. Whoever asks waits for [`ANSWER_PATIENCE`] and drops what comes later, so a claim may be heard of which
/// nobody hears the ruling.
pub trait Witness: fmt::Debug + fmt::Display + Send + Sync + 'static {
    /// Which witness this is. The first that asks gives it its identity.
    ///
    /// # Errors
    /// If it can't be reached or holds what can't be read.
    fn id(&self) -> Result<WitnessId, PortError>;

    /// Does what a claim would, without deciding anything: to see whether the witness can be reached, and how long that
    /// takes.
    ///
    /// # Errors
    /// As a claim's.
    fn probe(&self, agreed: WitnessId) -> Result<(), PortError>;

    /// Has `claim` judged, and returns once what was decided would survive a crash: also what others had decided before.
    /// `agreed` is the witness that both sides have found to be the same; what stands in its place by now, as the empty folder
    /// under a file system that was unmounted, has decided nothing and must not decide now.
    ///
    /// # Errors
    /// If it can't be reached, is not `agreed`, or can't decide. The claim may have been heard all the same: it is made again
    /// until it is answered.
    fn claim(&self, agreed: WitnessId, claim: &Claim) -> Result<Ruling, PortError>;
}

/// Where a witness is: `none`, `file:/FOLDER` or `etcd:http://HOST:PORT[,http://HOST:PORT..]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum WitnessAddress {
    /// There is none.
    #[default]
    None,
    /// A folder on shared storage.
    File(PathBuf),
    /// The members of an etcd cluster.
    #[cfg(feature = "etcd")]
    Etcd(Vec<String>),
}

impl WitnessAddress {
    /// The witness there; nothing is opened or connected yet.
    ///
    /// # Panics
    /// Outside a tokio runtime, for etcd.
    #[must_use]
    pub fn open(&self) -> Option<Arc<dyn Witness>> {
        match self {
            Self::None => None,
            Self::File(folder) => Some(Arc::new(FileWitness::new(folder.clone()))),
            #[cfg(feature = "etcd")]
            Self::Etcd(members) => Some(Arc::new(EtcdWitness::new(members.clone()))),
        }
    }
}

/// Why a text names no witness.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownWitness {
    /// It is none of the known forms.
    #[error("'{0}' is no witness; write none, file:/FOLDER or etcd:http://HOST:PORT[,http://HOST:PORT..]")]
    Unknown(String),
    /// This build has no client for etcd.
    #[error(
        "this ferry was built without etcd; build it with 'cargo build --release --features etcd', which needs protoc"
    )]
    NotBuilt,
}

impl FromStr for WitnessAddress {
    type Err = UnknownWitness;

    fn from_str(text: &str) -> Result<Self, UnknownWitness> {
        let unknown = || UnknownWitness::Unknown(text.to_owned());
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if path.starts_with('/') => Ok(Self::File(path.into())),
            #[cfg(not(feature = "etcd"))]
            Some(("etcd", _)) => Err(UnknownWitness::NotBuilt),
            #[cfg(feature = "etcd")]
            Some(("etcd", members)) => {
                let members: Vec<String> = members.split(',').map(str::to_owned).collect();
                let is_member = |member: &String| {
                    member.split_once("://").is_some_and(|(scheme, host)| scheme == "http" && host.len() > 1)
                };
                if members.iter().all(is_member) { Ok(Self::Etcd(members)) } else { Err(unknown()) }
            }
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for WitnessAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::File(folder) => write!(f, "file:{}", folder.display()),
            #[cfg(feature = "etcd")]
            Self::Etcd(members) => write!(f, "etcd:{}", members.join(",")),
        }
    }
}

/// 16 random bytes for a witness that has no identity yet.
fn random_identity() -> std::io::Result<WitnessId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(WitnessId(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back() {
        for text in ["none", "file:/mnt/shared/witness"] {
            assert_eq!(text.parse::<WitnessAddress>().unwrap().to_string(), text);
        }
        for bad in ["", "file:relative", "disk:/a", "none:"] {
            let error = bad.parse::<WitnessAddress>().unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("file:/FOLDER"), "{error}");
        }
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn an_etcd_cluster_is_its_members() {
        let text = "etcd:http://10.0.0.1:2379,http://10.0.0.2:2379";
        assert_eq!(text.parse::<WitnessAddress>().unwrap().to_string(), text);
        for bad in ["etcd:", "etcd:10.0.0.1:2379", "etcd:http://a:1,"] {
            assert!(bad.parse::<WitnessAddress>().is_err(), "{bad}");
        }
    }

    #[cfg(not(feature = "etcd"))]
    #[test]
    fn a_build_without_etcd_says_so() {
        let error = "etcd:http://a:1".parse::<WitnessAddress>().unwrap_err().to_string();
        assert!(error.contains("--features etcd"), "{error}");
    }
}
