//! Telling the network where a guest is now: gratuitous ARP, RARP and unsolicited neighbour advertisements; and
//! learning a guest's addresses from its own ARP and neighbour discovery.
//!
//! Switches learn from any of these frames; hosts update their caches from ARP (RFC 826, RFC 5227) and neighbour
//! advertisements (RFC 4861). RARP needs no IP address, so it goes out even where none is known.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use ferry_protocol::message::{ADDRESSES_MAX, NetworkIdentity};

use crate::ports::TargetVm;

type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The shortest frame on Ethernet, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

/// Rounds of announcements after the first, as QEMU's announce parameters have them by default.
pub const ROUNDS: u32 = 5;
const DELAY_FIRST: Duration = Duration::from_millis(50);
const DELAY_STEP: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_millis(550);

/// The wait before each repetition: 50 ms, then 100 ms more each time, at most 550 ms.
pub fn schedule() -> impl Iterator<Item = Duration> {
    (0..ROUNDS).map(|round| (DELAY_FIRST + DELAY_STEP * round).min(DELAY_MAX))
}

/// The frames of one round for a guest; none if it has no interface.
#[must_use]
pub fn frames(network: &NetworkIdentity) -> Vec<Vec<u8>> {
    let Some(mac) = network.mac else { return Vec::new() };
    let ipv4 = network.ipv4.iter().flat_map(|&ip| {
        // Some hosts take only requests, others only replies.
        [
            arp(ETHERTYPE_ARP, ARP_REQUEST, mac, ip, [0; 6], ip),
            arp(ETHERTYPE_ARP, ARP_REPLY, mac, ip, BROADCAST, ip),
        ]
    });
    let none = Ipv4Addr::UNSPECIFIED;
    let rarp = arp(ETHERTYPE_RARP, RARP_REQUEST, mac, none, mac, none);
    let ipv6 = network.ipv6.iter().map(|&ip| neighbour_advertisement(mac, ip));
    std::iter::once(rarp).chain(ipv4).chain(ipv6).collect()
}

/// Announces at once and then on the schedule. A frame that the tap does not take is lost like any other.
pub(crate) async fn announce(vm: Arc<dyn TargetVm>, network: NetworkIdentity) {
    let frames = frames(&network);
    if frames.is_empty() {
        return;
    }
    for delay in std::iter::once(Duration::ZERO).chain(schedule()) {
        tokio::time::sleep(delay).await;
        for frame in &frames {
            if let Err(error) = vm.announce(frame) {
                tracing::debug!("an announcement was not sent: {error}");
            }
        }
    }
}

fn ethernet(to: Mac, from: Mac, ethertype: u16) -> Vec<u8> {
    [to.as_slice(), &from, &ethertype.to_be_bytes()].concat()
}

fn arp(
    ethertype: u16,
    operation: u16,
    mac: Mac,
    ip: Ipv4Addr,
    target_mac: Mac,
    target_ip: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ethertype);
    // Ethernet, IPv4, their address lengths.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(ip.octets());
    frame.extend(target_mac);
    frame.extend(target_ip.octets());
    frame.resize(FRAME_BYTES_MIN, 0);
    frame
}

fn neighbour_advertisement(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    // Unsolicited with the override flag, and the target's link-layer address as an option (RFC 4861, 4.4).
    let mut icmp = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend(ip.octets());
    icmp.extend([2, 1]);
    icmp.extend(mac);
    let length = u16::try_from(icmp.len()).expect("32 bytes");
    let sum = checksum(&[
        ip.octets().as_slice(),
        &ALL_NODES.octets(),
        &u32::from(length).to_be_bytes(),
        &[0, 0, 0, ICMPV6],
        &icmp,
    ]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    // The multicast address's Ethernet form (RFC 2464, 7).
    let mut frame = ethernet([0x33, 0x33, 0, 0, 0, 1], mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(ip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(icmp);
    frame
}

/// The Internet checksum (RFC 1071) over parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        let (pairs, rest) = part.as_chunks::<2>();
        debug_assert!(rest.is_empty(), "all parts have an even length");
        sum += pairs.iter().map(|&pair| u32::from(u16::from_be_bytes(pair))).sum::<u32>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded above")
}

/// The addresses that a guest has been seen to use.
#[derive(Debug, Clone, Default)]
pub struct LearnedAddresses {
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
}

impl LearnedAddresses {
    /// Begins with addresses that the operator gave.
    #[must_use]
    pub fn new(ipv4: Vec<Ipv4Addr>, ipv6: Vec<Ipv6Addr>) -> Self {
        let mut learned = Self::default();
        ipv4.into_iter().for_each(|ip| remember(&mut learned.ipv4, ip));
        ipv6.into_iter().for_each(|ip| remember(&mut learned.ipv6, ip));
        learned
    }

    /// Looks at a frame that the guest with address `mac` has sent.
    pub fn observe(&mut self, mac: Mac, frame: &[u8]) {
        match sender(mac, frame) {
            Some(Sender::V4(ip)) => remember(&mut self.ipv4, ip),
            Some(Sender::V6(ip)) => remember(&mut self.ipv6, ip),
            None => {}
        }
    }

    /// What to announce for a guest with address `mac`.
    #[must_use]
    pub fn identity(&self, mac: Option<Mac>) -> NetworkIdentity {
        NetworkIdentity { mac, ipv4: self.ipv4.clone(), ipv6: self.ipv6.clone() }
    }
}

/// Remembers the newest [`ADDRESSES_MAX`] addresses; a guest can't make the list grow further.
fn remember<T: PartialEq>(known: &mut Vec<T>, address: T) {
    if known.contains(&address) {
        return;
    }
    if known.len() == ADDRESSES_MAX {
        known.remove(0);
    }
    known.push(address);
}

enum Sender {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
}

/// The IP address that a frame shows to be its sender's own.
fn sender(mac: Mac, frame: &[u8]) -> Option<Sender> {
    let (header, body) = frame.split_at_checked(14)?;
    if header[6..12] != mac {
        return None;
    }
    match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_ARP => {
            let ours = body.get(8..14)? == mac && body.get(..6)? == [0, 1, 8, 0, 6, 4];
            let ip = Ipv4Addr::from(*body.get(14..18)?.first_chunk::<4>()?);
            // A probe (RFC 5227) asks from 0.0.0.0 for an address that is not its own yet.
            (ours && !ip.is_unspecified()).then_some(Sender::V4(ip))
        }
        ETHERTYPE_IPV6 => {
            let from = Ipv6Addr::from(*body.get(8..24)?.first_chunk::<16>()?);
            let icmp = body.get(40..).filter(|_| body[6] == ICMPV6)?;
            let ip = match *icmp.first()? {
                NEIGHBOUR_ADVERTISEMENT => Ipv6Addr::from(*icmp.get(8..24)?.first_chunk::<16>()?),
                NEIGHBOUR_SOLICITATION => from,
                _ => return None,
            };
            (!ip.is_unspecified() && !ip.is_multicast()).then_some(Sender::V6(ip))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: Mac = [2, 0xfe, 0, 0, 0, 1];

    fn network() -> NetworkIdentity {
        NetworkIdentity {
            mac: Some(MAC),
            ipv4: vec![Ipv4Addr::new(10, 77, 0, 2)],
            ipv6: vec!["fe80::fe:1".parse().unwrap()],
        }
    }

    #[test]
    fn the_schedule_is_qemus() {
        let delays: Vec<u128> = schedule().map(|delay| delay.as_millis()).collect();
        assert_eq!(delays, [50, 150, 250, 350, 450]);
    }

    #[test]
    fn a_gratuitous_arp_has_the_bytes_of_rfc_5227() {
        let request = &frames(&network())[1];
        let wanted = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0xfe, 0, 0, 0, 1, 0x08, 0x06, // broadcast, from, ARP
            0, 1, 8, 0, 6, 4, 0, 1, // Ethernet, IPv4, request
            2, 0xfe, 0, 0, 0, 1, 10, 77, 0, 2, // sender
            0, 0, 0, 0, 0, 0, 10, 77, 0, 2, // target: the same address
        ];
        assert_eq!(request[..42], wanted);
        assert_eq!(request.len(), FRAME_BYTES_MIN);
    }

    #[test]
    fn what_is_announced_is_what_is_learned() {
        let mut learned = LearnedAddresses::default();
        for frame in frames(&network()) {
            learned.observe(MAC, &frame);
        }
        assert_eq!(learned.identity(Some(MAC)), network());
    }

    #[test]
    fn a_checksum_over_a_right_packet_is_zero() {
        let frame = neighbour_advertisement(MAC, "fe80::1".parse().unwrap());
        let (addresses, icmp) = (&frame[22..54], &frame[54..]);
        assert_eq!(checksum(&[addresses, &[0, 0, 0, 32], &[0, 0, 0, ICMPV6], icmp]), 0);
    }

    #[test]
    fn frames_of_others_and_probes_teach_nothing() {
        let mut learned = LearnedAddresses::default();
        learned.observe([9; 6], &frames(&network())[1]);
        let none = Ipv4Addr::UNSPECIFIED;
        let probe = arp(ETHERTYPE_ARP, ARP_REQUEST, MAC, none, [0; 6], Ipv4Addr::new(10, 77, 0, 2));
        learned.observe(MAC, &probe);
        assert_eq!(learned.identity(None), NetworkIdentity::default());
    }

    #[test]
    fn a_guest_can_not_fill_the_list() {
        let mut learned = LearnedAddresses::default();
        for last in 0..200u8 {
            let ip = Ipv4Addr::new(10, 0, 0, last);
            learned.observe(MAC, &arp(ETHERTYPE_ARP, ARP_REPLY, MAC, ip, BROADCAST, ip));
        }
        let identity = learned.identity(Some(MAC));
        assert_eq!(identity.ipv4.len(), ADDRESSES_MAX);
        assert_eq!(identity.ipv4.last(), Some(&Ipv4Addr::new(10, 0, 0, 199)));
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(kind in 0usize..3, tail in proptest::collection::vec(any::<u8>(), 0..80)) {
            let ethertype = [ETHERTYPE_ARP, ETHERTYPE_IPV6, 0x0800][kind];
            let frame = [ethernet(BROADCAST, MAC, ethertype), tail].concat();
            LearnedAddresses::default().observe(MAC, &frame);
        }
    }
}
