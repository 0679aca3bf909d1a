//! The hosts of one run: network namespaces with what lies between them. They go away with the value.
//!
//! On a loopback link both VMMs share one namespace, whose `lo` then carries nothing else. Otherwise they stand in
//! ferry-lab's hosts A and B on a switch, with the client beside them.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use ferry_lab::network::lab::{HOST_A_IPV4, HOST_B_IPV4, TAP, UPLINK, VM_IPV4, VM_MAC};
use ferry_lab::{Lab, Namespace, NetworkError};

use crate::engine::Place;
use crate::measure::MeasureError;
use crate::measure::counters::InterfaceCounter;
use crate::scenario::Link;

/// How much a token bucket may give at once, in ms of its rate: above the kernel's tick, below what a budget notices.
const BURST_MS: f64 = 4.0;

/// The least burst: one segment of the largest size that a stack hands down.
const BURST_BYTES_MIN: f64 = 65_536.0;

/// Why there are no hosts.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// The namespaces could not be made.
    #[error("can't make the test hosts")]
    Network(#[from] NetworkError),
    /// The link could not be limited.
    #[error(
        "can't limit the link of {host} with tc: {what} (it comes with iproute2 and needs the kernel's sch_tbf)"
    )]
    Limit {
        /// The host.
        host: String,
        /// What tc said.
        what: String,
    },
}

/// The hosts of one run.
#[derive(Debug)]
pub enum Hosts {
    /// One host, both VMMs on it.
    One(Namespace),
    /// Two hosts and a client on a switch.
    Two(Box<Lab>),
}

impl Hosts {
    /// Makes hosts with `link` between them.
    ///
    /// # Errors
    /// [`HostsError`]; nothing is left behind.
    pub fn make(link: Link) -> Result<Self, HostsError> {
        match link {
            Link::Loopback => Ok(Self::One(Namespace::new("host").map_err(NetworkError::from)?)),
            Link::Veth => Ok(Self::Two(Box::new(Lab::new()?))),
            Link::Tbf { rate_mbit_s, queue_ms } => {
                let lab = Lab::new()?;
                limit(&lab.host_a, rate_mbit_s, queue_ms)?;
                limit(&lab.host_b, rate_mbit_s, queue_ms)?;
                Ok(Self::Two(Box::new(lab)))
            }
        }
    }

    /// Where the guest is at first.
    #[must_use]
    pub fn source(&self, has_net: bool) -> Place<'_> {
        match self {
            Self::One(host) => Place { namespace: host, address: Ipv4Addr::LOCALHOST.into(), net: None },
            Self::Two(lab) => place(&lab.host_a, HOST_A_IPV4, has_net),
        }
    }

    /// Where it goes.
    #[must_use]
    pub fn target(&self, has_net: bool) -> Place<'_> {
        match self {
            Self::One(host) => Place { namespace: host, address: Ipv4Addr::LOCALHOST.into(), net: None },
            Self::Two(lab) => place(&lab.host_b, HOST_B_IPV4, has_net),
        }
    }

    /// Where clients are.
    #[must_use]
    pub fn client(&self) -> Option<&Namespace> {
        match self {
            Self::One(_) => None,
            Self::Two(lab) => Some(&lab.client),
        }
    }

    /// The source's wire, and its tap, whose traffic crosses the wire as well but is the guest's.
    ///
    /// # Errors
    /// [`MeasureError::Counters`].
    pub fn counters(&self) -> Result<(InterfaceCounter, Option<InterfaceCounter>), MeasureError> {
        match self {
            Self::One(host) => Ok((InterfaceCounter::of(host, "lo")?, None)),
            Self::Two(lab) => Ok((
                InterfaceCounter::of(&lab.host_a, UPLINK)?,
                Some(InterfaceCounter::of(&lab.host_a, TAP)?),
            )),
        }
    }
}

/// What a guest with a network is told of its address.
#[must_use]
pub fn guest_address() -> String {
    format!("ip={VM_IPV4}/24")
}

fn place(namespace: &Namespace, address: Ipv4Addr, has_net: bool) -> Place<'_> {
    Place { namespace, address: IpAddr::V4(address), net: has_net.then_some((TAP, VM_MAC)) }
}

/// A token bucket filter on what `host` sends.
fn limit(host: &Namespace, rate_mbit_s: f64, queue_ms: f64) -> Result<(), HostsError> {
    let bytes = |ms: f64| rate_mbit_s * 1e3 / 8.0 * ms;
    let burst = bytes(BURST_MS).max(BURST_BYTES_MIN);
    let queue = bytes(queue_ms) + burst;
    let failed = |what: String| HostsError::Limit { host: host.label().to_owned(), what };
    let mut command = Command::new("tc");
    let rate = format!("{:.0}kbit", rate_mbit_s * 1e3);
    command.args(["qdisc", "replace", "dev", UPLINK, "root", "tbf", "rate", &rate]);
    command.args(["burst", &format!("{burst:.0}"), "limit", &format!("{queue:.0}")]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = host.spawn(command).map_err(|error| failed(error.to_string()))?;
    let said = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if said.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&said.stderr).trim().to_owned()))
}
