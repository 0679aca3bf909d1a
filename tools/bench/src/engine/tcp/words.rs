//! What the harness and its bare TCP workers say to each other: one JSON object a line.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// What a source is to send once it is told where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceOrder {
    /// How much over all streams together.
    pub bytes: u64,
    /// Over how many connections.
    pub streams: u16,
}

/// What a target is to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetOrder {
    /// Where to listen, at a port that the kernel chooses.
    pub listen: IpAddr,
    /// How many connections will come.
    pub streams: u16,
}

/// The order to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendOrder {
    /// Where the target listens.
    pub target: SocketAddr,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "kebab-case")]
pub enum Said {
    /// The source could send.
    Ready,
    /// The target listens.
    Listening {
        /// Where.
        address: SocketAddr,
    },
    /// The target has told the source that it has read everything.
    Sent {
        /// So many bytes, by the target's word.
        bytes: u64,
    },
    /// It could not be sent.
    Failed {
        /// Why.
        reason: String,
    },
}
