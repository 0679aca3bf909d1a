//! The standard lab: two hosts and a client on one switch, each in its own namespace.
//!
//! Migration traffic and the VM's traffic share the hosts' uplinks, as they do where a host has one
//! network card. The VM's address is [`VM_IPV4`], whichever host it runs on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::namespace::Namespace;
use crate::network::{Links, Mac, NetworkError, VethEnd};

/// The address of host A, where its end of migrations listens and connects from.
pub const HOST_A_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 11);
/// The address of host B.
pub const HOST_B_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 12);
/// The address of the client.
pub const CLIENT_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
/// The address that the VM is to take.
pub const VM_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// How many leading bits of those addresses name the network.
pub const IPV4_PREFIX_BITS: u8 = 24;
/// How many leading bits of the IPv6 addresses name the network.
pub const IPV6_PREFIX_BITS: u8 = 64;
/// The hardware address that the VM is to take.
pub const VM_MAC: Mac = Mac::new([0x02, 0xfe, 0x77, 0, 0, 0x02]);
/// The bridge of each host and of the switch.
pub const BRIDGE: &str = "br0";
/// The tap of each host, for the VM.
pub const TAP: &str = "tap0";
/// The client's interface.
pub const CLIENT_INTERFACE: &str = "eth0";
/// How long the kernel may take to let frames pass after a cable was plugged in.
pub const PLUG_TIMEOUT: Duration = Duration::from_secs(10);
/// Each host's interface to the switch.
pub const UPLINK: &str = "uplink";

/// A port of the lab's switch, named for what is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwitchPort {
    /// Host A.
    HostA,
    /// Host B.
    HostB,
    /// The client.
    Client,
}

impl SwitchPort {
    const ALL: [Self; 3] = [Self::HostA, Self::HostB, Self::Client];

    /// Its interface in the switch's namespace.
    #[must_use]
    pub fn interface(self) -> &'static str {
        match self {
            Self::HostA => "port-a",
            Self::HostB => "port-b",
            Self::Client => "port-client",
        }
    }
}

/// Two hosts, a client and a switch. Dropping it removes them all.
#[derive(Debug)]
pub struct Lab {
    /// Where the VM starts: has `br0` with `uplink` and `tap0`, and [`HOST_A_IPV4`].
    pub host_a: Namespace,
    /// Where the VM goes: has `br0` with `uplink` and `tap0`, and [`HOST_B_IPV4`].
    pub host_b: Namespace,
    /// Who uses the VM: has `eth0` with [`CLIENT_IPV4`].
    pub client: Namespace,
    /// What joins them: `br0` with `port-a`, `port-b` and `port-client`.
    pub switch: Namespace,
}

impl Lab {
    /// Makes the lab. When this returns, every station reaches every other. That takes a few dozen
    /// milliseconds, or a second or two if the kernel is slow to notice the carriers.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`] without root; otherwise whatever could not be made. Nothing is
    /// left behind then.
    pub fn new() -> Result<Self, NetworkError> {
        let lab = Self {
            host_a: Namespace::new("host-a")?,
            host_b: Namespace::new("host-b")?,
            client: Namespace::new("client")?,
            switch: Namespace::new("switch")?,
        };
        Links::of(&lab.switch).add_bridge(BRIDGE, station_mac(0xff))?;
        lab.plug_host(&lab.host_a, SwitchPort::HostA, HOST_A_IPV4)?;
        lab.plug_host(&lab.host_b, SwitchPort::HostB, HOST_B_IPV4)?;
        lab.plug(&lab.client, CLIENT_INTERFACE, SwitchPort::Client, CLIENT_IPV4)?;
        add_addresses(&lab.client, CLIENT_INTERFACE, CLIENT_IPV4)?;
        for port in SwitchPort::ALL {
            lab.wait_until_carrying(port)?;
        }
        Ok(lab)
    }

    /// Behind which port the switch last saw `mac`, or `None` if it has not seen it.
    ///
    /// # Errors
    /// [`NetworkError`] if netlink fails.
    pub fn vm_port(&self, mac: Mac) -> Result<Option<SwitchPort>, NetworkError> {
        let entries = Links::of(&self.switch).fdb(BRIDGE)?;
        let entry = entries.into_iter().find(|entry| entry.learned && entry.mac == mac);
        Ok(entry.and_then(|entry| SwitchPort::ALL.into_iter().find(|port| port.interface() == entry.port)))
    }

    /// Pulls the cable out of `port`.
    ///
    /// # Errors
    /// [`NetworkError`] if netlink fails.
    pub fn unplug(&self, port: SwitchPort) -> Result<(), NetworkError> {
        Links::of(&self.switch).down(port.interface())
    }

    /// Puts the cable back into `port`, and waits until frames pass through it.
    ///
    /// # Errors
    /// [`NetworkError::NotCarrying`] if none does; otherwise what netlink failed at.
    pub fn replug(&self, port: SwitchPort) -> Result<(), NetworkError> {
        Links::of(&self.switch).up(port.interface())?;
        self.wait_until_carrying(port)
    }

    fn wait_until_carrying(&self, port: SwitchPort) -> Result<(), NetworkError> {
        let (station, interfaces) = match port {
            SwitchPort::HostA => (&self.host_a, &[UPLINK, BRIDGE][..]),
            SwitchPort::HostB => (&self.host_b, &[UPLINK, BRIDGE][..]),
            SwitchPort::Client => (&self.client, &[CLIENT_INTERFACE][..]),
        };
        Links::of(&self.switch).wait_until_carrying(port.interface(), PLUG_TIMEOUT)?;
        interfaces.iter().try_for_each(|name| Links::of(station).wait_until_carrying(name, PLUG_TIMEOUT))
    }

    fn plug_host(&self, host: &Namespace, port: SwitchPort, address: Ipv4Addr) -> Result<(), NetworkError> {
        let links = Links::of(host);
        links.add_bridge(BRIDGE, station_mac(address.octets()[3]))?;
        self.plug(host, UPLINK, port, address)?;
        links.enslave(UPLINK, BRIDGE)?;
        links.add_tap(TAP)?;
        links.enslave(TAP, BRIDGE)?;
        add_addresses(host, BRIDGE, address)
    }

    fn plug(
        &self,
        station: &Namespace,
        interface: &str,
        port: SwitchPort,
        address: Ipv4Addr,
    ) -> Result<(), NetworkError> {
        let number = address.octets()[3];
        Links::add_veth(
            VethEnd { namespace: station, name: interface, mac: uplink_mac(number) },
            VethEnd { namespace: &self.switch, name: port.interface(), mac: port_mac(number) },
        )?;
        let switch = Links::of(&self.switch);
        switch.enslave(port.interface(), BRIDGE)?;
        switch.up(port.interface())?;
        Links::of(station).up(interface)
    }
}

/// The IPv6 address beside one of the lab's IPv4 addresses: the same last byte in fd77::/64.
#[must_use]
pub fn ipv6_beside(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(address.octets()[3]))
}

fn add_addresses(station: &Namespace, interface: &str, address: Ipv4Addr) -> Result<(), NetworkError> {
    let links = Links::of(station);
    links.add_address(interface, IpAddr::V4(address), IPV4_PREFIX_BITS)?;
    links.add_address(interface, IpAddr::V6(ipv6_beside(address)), IPV6_PREFIX_BITS)
}

// Locally administered addresses; the byte before the last tells what kind of interface it is.
fn station_mac(number: u8) -> Mac {
    Mac::new([0x02, 0xfe, 0x77, 0, 0x01, number])
}

fn uplink_mac(number: u8) -> Mac {
    Mac::new([0x02, 0xfe, 0x77, 0, 0x02, number])
}

fn port_mac(number: u8) -> Mac {
    Mac::new([0x02, 0xfe, 0x77, 0, 0x03, number])
}
