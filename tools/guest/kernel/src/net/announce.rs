//! Announcing the guest's addresses once at boot, so that bridges and hosts that listen learn them.
//!
//! After a migration it is the target's VMM that announces, not the guest: a guest doesn't know that it moved.

use super::Nic;
use core::net::{Ipv4Addr, Ipv6Addr};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};

const ETHERNET_HEADER_LEN: usize = 14;
const IPV6_HEADER_LEN: usize = 40;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: EthernetAddress = EthernetAddress([0x33, 0x33, 0, 0, 0, 1]);

/// Sends a gratuitous ARP request (RFC 5227's announcement).
pub fn ipv4(nic: &mut Nic, address: Ipv4Addr) {
    let mac = nic.mac();
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: mac,
        source_protocol_addr: address,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: address,
    };
    let ethernet = EthernetRepr {
        src_addr: mac,
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Arp,
    };
    nic.send(ETHERNET_HEADER_LEN + arp.buffer_len(), |frame| {
        ethernet.emit(&mut EthernetFrame::new_unchecked(&mut *frame));
        arp.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]));
    });
}

/// Sends an unsolicited neighbour advertisement to all nodes (RFC 4861, section 7.2.6).
pub fn ipv6(nic: &mut Nic, address: Ipv6Addr) {
    let mac = nic.mac();
    let advertisement = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::OVERRIDE,
        target_addr: address,
        lladdr: Some(mac.into()),
    });
    let ip = Ipv6Repr {
        src_addr: address,
        dst_addr: ALL_NODES,
        next_header: IpProtocol::Icmpv6,
        payload_len: advertisement.buffer_len(),
        hop_limit: 255,
    };
    let ethernet = EthernetRepr { src_addr: mac, dst_addr: ALL_NODES_MAC, ethertype: EthernetProtocol::Ipv6 };
    nic.send(ETHERNET_HEADER_LEN + IPV6_HEADER_LEN + advertisement.buffer_len(), |frame| {
        ethernet.emit(&mut EthernetFrame::new_unchecked(&mut *frame));
        let packet = &mut frame[ETHERNET_HEADER_LEN..];
        ip.emit(&mut Ipv6Packet::new_unchecked(&mut *packet));
        let body = &mut packet[IPV6_HEADER_LEN..];
        advertisement.emit(
            &address,
            &ALL_NODES,
            &mut Icmpv6Packet::new_unchecked(body),
            &ChecksumCapabilities::default(),
        );
    });
}
