//! Interfaces, bridges and addresses of a namespace, through rtnetlink.
//!
//! Every operation opens its own netlink socket on a thread inside the namespace, so that nothing is
//! held between calls and callers may or may not run in a tokio runtime. That costs a fraction of a
//! millisecond each, which setting up a lab does not notice.
//!
//! Left out: routes beyond those that addresses bring along, queueing disciplines, VLANs.

pub mod lab;
mod mac;

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use ferry_vmm::tap::{Tap, TapError};
use futures::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{
    BridgePortState, BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoPortData, InfoVeth,
    LinkAttribute, LinkInfo, LinkMessage, State,
};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth};

pub use mac::{Mac, MacError};

use crate::clock::LabClock;
use crate::namespace::{Namespace, NamespaceError};

/// How long a bridge remembers where it saw a MAC. The unit of the kernel is 10 ms.
const BRIDGE_AGEING_CENTISECONDS: u32 = 300 * 100;

/// How often [`Links::wait_until_carrying`] looks.
const CARRIER_POLL: Duration = Duration::from_millis(1);

/// Why an interface could not be made, changed or read.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace could not be made or entered.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// There is no such interface.
    #[error("there is no interface '{name}' in the namespace of '{host}'")]
    Missing {
        /// The interface that was asked for.
        name: String,
        /// The namespace's label.
        host: String,
    },
    /// The kernel refused a request.
    #[error("can't {action} '{name}' in the namespace of '{host}'")]
    Netlink {
        /// What was tried, as a verb.
        action: &'static str,
        /// The interface it was tried on.
        name: String,
        /// The namespace's label.
        host: String,
        /// What the kernel said.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// No netlink socket could be had.
    #[error("can't open a netlink socket in the namespace of '{host}'")]
    Socket {
        /// The namespace's label.
        host: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An interface did not come to carry frames.
    #[error("'{name}' in the namespace of '{host}' still carries no frames after {waited_ms} ms")]
    NotCarrying {
        /// The interface.
        name: String,
        /// The namespace's label.
        host: String,
        /// How long it was waited for, in milliseconds.
        waited_ms: u128,
    },
    /// A tap could not be made.
    #[error("can't make a tap in the namespace of '{host}'")]
    Tap {
        /// The namespace's label.
        host: String,
        /// What failed.
        #[source]
        source: TapError,
    },
}

/// One end of a veth pair.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// The namespace it lies in.
    pub namespace: &'a Namespace,
    /// Its interface name, at most 15 bytes.
    pub name: &'a str,
    /// Its hardware address.
    pub mac: Mac,
}

/// What a bridge knows of a MAC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdbEntry {
    /// The hardware address.
    pub mac: Mac,
    /// The name of the bridge port that leads to it.
    pub port: String,
    /// Whether it was learned from traffic. Otherwise it is the port's own address.
    pub learned: bool,
}

/// The interfaces of one namespace.
#[derive(Debug, Clone, Copy)]
pub struct Links<'a> {
    namespace: &'a Namespace,
}

impl<'a> Links<'a> {
    /// The interfaces of `namespace`.
    #[must_use]
    pub fn of(namespace: &'a Namespace) -> Self {
        Self { namespace }
    }

    /// Makes a veth pair, each end in its own namespace, both still down.
    ///
    /// # Errors
    /// [`NetworkError`]: a name that is taken or too long, a missing privilege.
    pub fn add_veth(near: VethEnd<'_>, far: VethEnd<'_>) -> Result<(), NetworkError> {
        let peer = LinkUnspec::new_with_name(far.name)
            .address(far.mac.octets().to_vec())
            .setns_by_fd(far.namespace.as_fd().as_raw_fd())
            .build();
        let message = LinkVeth::new(near.name, far.name)
            .address(near.mac.octets().to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        Links::of(near.namespace).request("make the veth pair", near.name, async move |handle| {
            handle.link().add(message).execute().await
        })
    }

    /// Makes a bridge without spanning tree and forward delay, and brings it up.
    ///
    /// Its `mac` is set, since a bridge would otherwise take the lowest of its ports' and change it
    /// whenever a port comes or goes, which disturbs traffic to the host.
    ///
    /// # Errors
    /// [`NetworkError`]: a name that is taken or too long, a missing privilege.
    pub fn add_bridge(&self, name: &str, mac: Mac) -> Result<(), NetworkError> {
        let message = LinkBridge::new(name)
            .address(mac.octets().to_vec())
            .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
            .append_info_data(InfoBridge::ForwardDelay(0))
            .append_info_data(InfoBridge::AgeingTime(BRIDGE_AGEING_CENTISECONDS))
            // Without a querier, snooping delays or drops the neighbour discovery of new hosts.
            .append_info_data(InfoBridge::MulticastSnooping(false))
            .build();
        self.request("make the bridge", name, async move |handle| handle.link().add(message).execute().await)
    }

    /// Makes the persistent tap `name`, which a machine can attach to, and brings it up.
    ///
    /// # Errors
    /// [`NetworkError::Tap`] if there is no tun driver, the name can't be or another process has it.
    pub fn add_tap(&self, name: &str) -> Result<(), NetworkError> {
        self.namespace
            .run(|| Tap::make_persistent(name))?
            .map_err(|source| NetworkError::Tap { host: self.host(), source })?;
        self.up(name)
    }

    /// Makes `port` a port of `bridge`.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if either does not exist.
    pub fn enslave(&self, port: &str, bridge: &str) -> Result<(), NetworkError> {
        let bridge_index = self.index(bridge)?;
        self.change("attach to its bridge", port, |link| link.controller(bridge_index))
    }

    /// Brings `name` up.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if it does not exist.
    pub fn up(&self, name: &str) -> Result<(), NetworkError> {
        self.change("bring up", name, LinkMessageBuilder::up)
    }

    /// Takes `name` down: no frame passes any more, and its peer loses its carrier.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if it does not exist.
    pub fn down(&self, name: &str) -> Result<(), NetworkError> {
        self.change("take down", name, LinkMessageBuilder::down)
    }

    /// Waits until `name` carries frames: it has its carrier and, as a port, its bridge forwards.
    ///
    /// The kernel notices a carrier in its own time, sometimes only after a second. Frames before
    /// that are lost, and an ARP request that was lost is repeated only after another second.
    ///
    /// # Errors
    /// [`NetworkError::NotCarrying`] if that is not so after `timeout`.
    pub fn wait_until_carrying(&self, name: &str, timeout: Duration) -> Result<(), NetworkError> {
        let clock = LabClock::start();
        while !is_carrying(&self.link(name)?) {
            if clock.now() >= timeout {
                let waited_ms = timeout.as_millis();
                return Err(NetworkError::NotCarrying { name: name.into(), host: self.host(), waited_ms });
            }
            thread::sleep(CARRIER_POLL);
        }
        Ok(())
    }

    /// Gives `name` another hardware address.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if it does not exist.
    pub fn set_mac(&self, name: &str, mac: Mac) -> Result<(), NetworkError> {
        self.change("set the MAC of", name, |link| link.address(mac.octets().to_vec()))
    }

    /// Removes the interface `name`, and its peer if it is a veth.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if it does not exist.
    pub fn remove(&self, name: &str) -> Result<(), NetworkError> {
        let index = self.index(name)?;
        self.request("remove", name, async move |handle| handle.link().del(index).execute().await)
    }

    /// Adds an address to `name`, and with it the route to its network. IPv6 addresses can be used
    /// at once: duplicates are not looked for.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if the interface does not exist; otherwise the kernel's refusal.
    pub fn add_address(&self, name: &str, address: IpAddr, prefix_bits: u8) -> Result<(), NetworkError> {
        let index = self.index(name)?;
        self.request("add an address to", name, async move |handle| {
            let mut request = handle.address().add(index, address, prefix_bits);
            if address.is_ipv6() {
                request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            request.execute().await
        })
    }

    /// The hardware address of `name`.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if it does not exist, or has none.
    pub fn mac(&self, name: &str) -> Result<Mac, NetworkError> {
        let link = self.link(name)?;
        let mac = link.attributes.iter().find_map(|attribute| {
            if let LinkAttribute::Address(bytes) = attribute { Mac::from_slice(bytes) } else { None }
        });
        mac.ok_or_else(|| self.missing(name))
    }

    /// The names of all interfaces, the loopback included.
    ///
    /// # Errors
    /// [`NetworkError`] if netlink fails.
    pub fn names(&self) -> Result<Vec<String>, NetworkError> {
        Ok(self.indexed_names()?.into_iter().map(|(_, name)| name).collect())
    }

    /// The forwarding database of `bridge`: behind which port it saw which MAC.
    ///
    /// # Errors
    /// [`NetworkError::Missing`] if there is no such bridge.
    pub fn fdb(&self, bridge: &str) -> Result<Vec<FdbEntry>, NetworkError> {
        let bridge_index = self.index(bridge)?;
        let names = self.indexed_names()?;
        let entries = self.request("read the forwarding database of", bridge, async |handle| {
            let request = handle.neighbours().get().set_address_family(AddressFamily::Bridge);
            request.execute().try_collect::<Vec<_>>().await
        })?;
        let of_bridge = entries.into_iter().filter(|entry| {
            entry.attributes.contains(&NeighbourAttribute::Controller(bridge_index))
                && entry.header.ifindex != bridge_index
        });
        let read = of_bridge.filter_map(|entry| {
            let mac = entry.attributes.iter().find_map(|attribute| {
                if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
                    Mac::from_slice(bytes)
                } else {
                    None
                }
            })?;
            let (_, port) = names.iter().find(|(index, _)| *index == entry.header.ifindex)?;
            let learned = entry.header.state != NeighbourState::Permanent;
            Some(FdbEntry { mac, port: port.clone(), learned })
        });
        Ok(read.collect())
    }

    fn host(&self) -> String {
        self.namespace.label().to_owned()
    }

    fn missing(&self, name: &str) -> NetworkError {
        NetworkError::Missing { name: name.into(), host: self.host() }
    }

    fn index(&self, name: &str) -> Result<u32, NetworkError> {
        Ok(self.link(name)?.header.index)
    }

    fn link(&self, name: &str) -> Result<LinkMessage, NetworkError> {
        let wanted = name.to_owned();
        let found = self.request("look up", name, async move |handle| {
            handle.link().get().match_name(wanted).execute().try_next().await
        });
        match found {
            Ok(Some(link)) => Ok(link),
            Ok(None) => Err(self.missing(name)),
            Err(NetworkError::Netlink { source, .. }) if is_no_device(&source) => Err(self.missing(name)),
            Err(error) => Err(error),
        }
    }

    fn indexed_names(&self) -> Result<Vec<(u32, String)>, NetworkError> {
        let links = self.request("list the interfaces of", self.namespace.label(), async |handle| {
            handle.link().get().execute().try_collect::<Vec<_>>().await
        })?;
        let named = links.into_iter().filter_map(|link| {
            let name = link.attributes.into_iter().find_map(|attribute| {
                if let LinkAttribute::IfName(name) = attribute { Some(name) } else { None }
            })?;
            Some((link.header.index, name))
        });
        Ok(named.collect())
    }

    fn change(
        &self,
        action: &'static str,
        name: &str,
        edit: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), NetworkError> {
        let message = edit(LinkUnspec::new_with_index(self.index(name)?)).build();
        self.request(action, name, async move |handle| handle.link().change(message).execute().await)
    }

    /// Runs one netlink conversation on a thread inside the namespace.
    fn request<T, F>(
        &self,
        action: &'static str,
        name: &str,
        conversation: impl FnOnce(Handle) -> F + Send,
    ) -> Result<T, NetworkError>
    where
        T: Send,
        F: Future<Output = Result<T, rtnetlink::Error>>,
    {
        let socket_error = |source| NetworkError::Socket { host: self.host(), source };
        self.namespace.run(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(socket_error)?;
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().map_err(socket_error)?;
                // Dropping the runtime below ends the connection's task and closes its socket.
                tokio::spawn(connection);
                conversation(handle).await.map_err(|source| NetworkError::Netlink {
                    action,
                    name: name.to_owned(),
                    host: self.host(),
                    source: Box::new(source),
                })
            })
        })?
    }
}

fn is_carrying(link: &LinkMessage) -> bool {
    let is_up = link.attributes.contains(&LinkAttribute::OperState(State::Up));
    let mut port_states = link.attributes.iter().filter_map(port_state);
    is_up && port_states.all(|state| state == BridgePortState::Forwarding)
}

/// The state of a bridge port; `None` if that is not what the attribute tells.
fn port_state(attribute: &LinkAttribute) -> Option<BridgePortState> {
    let LinkAttribute::LinkInfo(infos) = attribute else { return None };
    infos.iter().find_map(|info| {
        let LinkInfo::PortData(InfoPortData::BridgePort(port)) = info else { return None };
        port.iter().find_map(|info| if let InfoBridgePort::State(state) = info { Some(*state) } else { None })
    })
}

fn is_no_device(error: &rtnetlink::Error) -> bool {
    if let rtnetlink::Error::NetlinkError(reply) = error {
        reply.to_io().raw_os_error() == Some(Errno::ENODEV as i32)
    } else {
        false
    }
}
