//! Reading the few kinds of Ethernet frames by which a machine announces where it is.
//!
//! ```text
//!   0      6      12     14
//!   │ to   │ from │ type │ payload ...
//!   type 0x0806 ARP (RFC 826), 0x8035 RARP (RFC 903), 0x86dd IPv6 with ICMPv6 type 136 (RFC 4861, 4.4)
//! ```
//!
//! Every length is checked; what does not hold up is [`FrameKind::Malformed`] with the reason. VLAN
//! tags and IPv6 extension headers are not followed.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::network::Mac;

/// The length of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// The length of an ARP or RARP packet for Ethernet and IPv4.
const ARP_BYTES: usize = 28;
/// The length of an IPv6 header.
const IPV6_BYTES: usize = 40;
/// The length of a neighbour advertisement without options.
const ADVERTISEMENT_BYTES: usize = 24;

pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_RARP: u16 = 0x8035;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(super) const NEXT_HEADER_ICMPV6: u8 = 58;
pub(super) const ICMPV6_ADVERTISEMENT: u8 = 136;

const ADVERTISEMENT_SOLICITED: u8 = 0x40;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// An ARP request by which the sender announces its own address.
    GratuitousArpRequest {
        /// The sender.
        mac: Mac,
        /// The address it announces.
        ip: Ipv4Addr,
    },
    /// An ARP reply that nobody asked for, by which the sender announces its own address.
    GratuitousArpReply {
        /// The sender.
        mac: Mac,
        /// The address it announces.
        ip: Ipv4Addr,
    },
    /// A question who has an address.
    ArpRequest {
        /// Who asks.
        mac: Mac,
        /// The address that is asked for.
        target: Ipv4Addr,
    },
    /// The answer to such a question.
    ArpReply {
        /// Who answers.
        mac: Mac,
        /// The address it has.
        ip: Ipv4Addr,
    },
    /// A RARP request, which teaches switches where a MAC is without naming an IP address.
    Rarp {
        /// The MAC that is announced.
        mac: Mac,
    },
    /// An IPv6 neighbour advertisement that nobody asked for.
    UnsolicitedAdvertisement {
        /// The link-layer address in it, if it names one.
        mac: Option<Mac>,
        /// The address it announces.
        ip: Ipv6Addr,
    },
    /// An IPv6 neighbour advertisement that answers a solicitation.
    SolicitedAdvertisement {
        /// The address it is about.
        ip: Ipv6Addr,
    },
    /// Anything else.
    Other {
        /// The type field of its Ethernet header.
        ethertype: u16,
    },
    /// It claims to be one of these, and is not.
    Malformed {
        /// What is wrong with it.
        why: &'static str,
    },
}

/// A captured frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// When the kernel saw it, in microseconds since the clock's origin.
    pub at_us: u64,
    /// Whether this interface sent it. Otherwise it was received.
    pub outgoing: bool,
    /// Its bytes from the Ethernet header on, at most [`SNAP_BYTES`](super::SNAP_BYTES).
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Who sent it, by its Ethernet header.
    #[must_use]
    pub fn source(&self) -> Option<Mac> {
        Mac::from_slice(self.bytes.get(6..12)?)
    }

    /// Whom it is for, by its Ethernet header.
    #[must_use]
    pub fn destination(&self) -> Option<Mac> {
        Mac::from_slice(self.bytes.get(..6)?)
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        kind_of(&self.bytes).unwrap_or_else(|why| FrameKind::Malformed { why })
    }

    /// The MAC whose place this frame announces, if it is a gratuitous ARP, a RARP or an unsolicited
    /// advertisement.
    #[must_use]
    pub fn announced(&self) -> Option<Mac> {
        match self.kind() {
            FrameKind::GratuitousArpRequest { mac, .. }
            | FrameKind::GratuitousArpReply { mac, .. }
            | FrameKind::Rarp { mac } => Some(mac),
            FrameKind::UnsolicitedAdvertisement { mac, .. } => mac.or_else(|| self.source()),
            FrameKind::ArpRequest { .. }
            | FrameKind::ArpReply { .. }
            | FrameKind::SolicitedAdvertisement { .. }
            | FrameKind::Other { .. }
            | FrameKind::Malformed { .. } => None,
        }
    }
}

fn kind_of(bytes: &[u8]) -> Result<FrameKind, &'static str> {
    let (header, payload) =
        bytes.split_first_chunk::<ETHERNET_BYTES>().ok_or("shorter than an Ethernet header")?;
    match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_ARP => arp(payload),
        ETHERTYPE_RARP => rarp(payload),
        ETHERTYPE_IPV6 => ipv6(payload),
        ethertype => Ok(FrameKind::Other { ethertype }),
    }
}

struct ArpPacket {
    operation: u16,
    sender_mac: Mac,
    sender_ip: Ipv4Addr,
    target_mac: Mac,
    target_ip: Ipv4Addr,
}

/// Hardware type 1, protocol 0x0800, lengths 6 and 4: the only ARP there is on Ethernet.
const ARP_FIXED: [u8; 6] = [0, 1, 8, 0, 6, 4];

fn arp_packet(payload: &[u8]) -> Result<ArpPacket, &'static str> {
    let packet = payload.first_chunk::<ARP_BYTES>().ok_or("shorter than an ARP packet")?;
    if packet[..6] != ARP_FIXED {
        return Err("no ARP for Ethernet and IPv4");
    }
    let mac = |at: usize| Mac::from_slice(&packet[at..at + 6]).ok_or("no MAC");
    let ip = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    Ok(ArpPacket {
        operation: u16::from_be_bytes([packet[6], packet[7]]),
        sender_mac: mac(8)?,
        sender_ip: ip(14),
        target_mac: mac(18)?,
        target_ip: ip(24),
    })
}

fn arp(payload: &[u8]) -> Result<FrameKind, &'static str> {
    let packet = arp_packet(payload)?;
    let (mac, ip) = (packet.sender_mac, packet.sender_ip);
    let gratuitous = packet.sender_ip == packet.target_ip;
    match (packet.operation, gratuitous) {
        (1, true) => Ok(FrameKind::GratuitousArpRequest { mac, ip }),
        (1, false) => Ok(FrameKind::ArpRequest { mac, target: packet.target_ip }),
        (2, true) => Ok(FrameKind::GratuitousArpReply { mac, ip }),
        (2, false) => Ok(FrameKind::ArpReply { mac, ip }),
        _ => Err("an ARP operation that is neither request nor reply"),
    }
}

fn rarp(payload: &[u8]) -> Result<FrameKind, &'static str> {
    let packet = arp_packet(payload)?;
    if packet.operation != 3 {
        return Err("a RARP operation that is no request");
    }
    if packet.sender_mac != packet.target_mac {
        return Err("a RARP request about somebody else");
    }
    Ok(FrameKind::Rarp { mac: packet.sender_mac })
}

fn ipv6(payload: &[u8]) -> Result<FrameKind, &'static str> {
    let (header, rest) = payload.split_first_chunk::<IPV6_BYTES>().ok_or("shorter than an IPv6 header")?;
    if header[6] != NEXT_HEADER_ICMPV6 || rest.first() != Some(&ICMPV6_ADVERTISEMENT) {
        return Ok(FrameKind::Other { ethertype: ETHERTYPE_IPV6 });
    }
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let message = rest.get(..length).ok_or("shorter than its IPv6 header says")?;
    if header[7] != 255 {
        return Err("an advertisement whose hop limit is not 255");
    }
    if icmpv6_sum(header, message) != 0xffff {
        return Err("an advertisement whose checksum is wrong");
    }
    advertisement(message)
}

fn advertisement(message: &[u8]) -> Result<FrameKind, &'static str> {
    let (fixed, mut options) =
        message.split_first_chunk::<ADVERTISEMENT_BYTES>().ok_or("shorter than a neighbour advertisement")?;
    let target: [u8; 16] = fixed[8..].try_into().map_err(|_| "no target address")?;
    let ip = Ipv6Addr::from(target);
    if fixed[4] & ADVERTISEMENT_SOLICITED != 0 {
        return Ok(FrameKind::SolicitedAdvertisement { ip });
    }
    let mut mac = None;
    while let [kind, eights, ..] = *options {
        let length = usize::from(eights) * 8;
        // A length of zero would never end.
        let option = options.get(2..length).ok_or("an option that is longer than the message, or empty")?;
        if kind == OPTION_TARGET_LINK_ADDRESS {
            mac = Mac::from_slice(option);
        }
        options = &options[length..];
    }
    Ok(FrameKind::UnsolicitedAdvertisement { mac, ip })
}

/// The ones' complement sum over the pseudo header (RFC 8200, 8.1) and the message, its checksum
/// included: all ones if that is right.
fn icmpv6_sum(header: &[u8; IPV6_BYTES], message: &[u8]) -> u16 {
    let addresses = header[8..].chunks(2);
    let words = addresses
        .chain(message.chunks(2))
        .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    let mut sum = words.sum::<u64>() + message.len() as u64 + u64::from(NEXT_HEADER_ICMPV6);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac::new([2, 0xfe, 0x77, 0, 0, 2]);
    const IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    fn frame(ethertype: u16, payload: &[u8]) -> Frame {
        let mut bytes = vec![0xff; 6];
        bytes.extend(MAC.octets());
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(payload);
        Frame { at_us: 0, outgoing: false, bytes }
    }

    fn arp_payload(operation: u8, target: Ipv4Addr) -> Vec<u8> {
        let mut payload = ARP_FIXED.to_vec();
        payload.extend([0, operation]);
        payload.extend(MAC.octets());
        payload.extend(IP.octets());
        payload.extend(MAC.octets());
        payload.extend(target.octets());
        payload
    }

    /// An unsolicited advertisement of fe80::2 to ff02::1, its checksum still zero. By hand: the
    /// addresses sum to 1FD85, length 32 and next header 58 to 5A, type and flags to A800, the target
    /// to FE82, the option to 0201 + 02FE + 7700 + 0002; all that is 42062, folds to 2066, and its
    /// complement is DF99.
    fn advertisement_payload() -> Vec<u8> {
        let mut payload = vec![0x60, 0, 0, 0, 0, 32, 58, 255];
        let from: Ipv6Addr = "fe80::2".parse().unwrap();
        let to: Ipv6Addr = "ff02::1".parse().unwrap();
        payload.extend(from.octets());
        payload.extend(to.octets());
        payload.extend([136, 0, 0, 0, 0x20, 0, 0, 0]);
        payload.extend(from.octets());
        payload.extend([2, 1]);
        payload.extend(MAC.octets());
        payload
    }

    fn with_checksum(mut payload: Vec<u8>) -> Vec<u8> {
        let header: [u8; IPV6_BYTES] = payload[..IPV6_BYTES].try_into().unwrap();
        let checksum = !icmpv6_sum(&header, &payload[IPV6_BYTES..]);
        payload[42..44].copy_from_slice(&checksum.to_be_bytes());
        payload
    }

    #[test]
    fn announcements_are_told_from_questions_and_answers() {
        let other = Ipv4Addr::new(10, 77, 0, 9);
        let cases = [
            (ETHERTYPE_ARP, arp_payload(1, IP), FrameKind::GratuitousArpRequest { mac: MAC, ip: IP }),
            (ETHERTYPE_ARP, arp_payload(2, IP), FrameKind::GratuitousArpReply { mac: MAC, ip: IP }),
            (ETHERTYPE_ARP, arp_payload(1, other), FrameKind::ArpRequest { mac: MAC, target: other }),
            (ETHERTYPE_ARP, arp_payload(2, other), FrameKind::ArpReply { mac: MAC, ip: IP }),
            (ETHERTYPE_RARP, arp_payload(3, IP), FrameKind::Rarp { mac: MAC }),
            (0x0800, vec![1, 2, 3], FrameKind::Other { ethertype: 0x0800 }),
        ];
        for (ethertype, payload, kind) in cases {
            let frame = frame(ethertype, &payload);
            assert_eq!(frame.kind(), kind);
            let announces = matches!(
                kind,
                FrameKind::GratuitousArpRequest { .. }
                    | FrameKind::GratuitousArpReply { .. }
                    | FrameKind::Rarp { .. }
            );
            assert_eq!(frame.announced().is_some(), announces, "{kind:?}");
            assert_eq!((frame.source(), frame.destination()), (Some(MAC), Some(Mac::BROADCAST)));
        }
    }

    #[test]
    fn an_advertisement_needs_its_checksum_hop_limit_and_options() {
        let ip = "fe80::2".parse().unwrap();
        let right = with_checksum(advertisement_payload());
        assert_eq!(right[42..44], [0xdf, 0x99], "{:x?}", &right[42..44]);
        let kind = frame(ETHERTYPE_IPV6, &right).kind();
        assert_eq!(kind, FrameKind::UnsolicitedAdvertisement { mac: Some(MAC), ip });

        let mut solicited = advertisement_payload();
        solicited[44] |= ADVERTISEMENT_SOLICITED;
        let kind = frame(ETHERTYPE_IPV6, &with_checksum(solicited)).kind();
        assert_eq!(kind, FrameKind::SolicitedAdvertisement { ip });

        let mut wrong = right.clone();
        wrong[60] ^= 1;
        let malformed =
            |payload: &[u8]| matches!(frame(ETHERTYPE_IPV6, payload).kind(), FrameKind::Malformed { .. });
        assert!(malformed(&wrong));
        let mut routed = right.clone();
        routed[7] = 64;
        assert!(malformed(&routed));
        let mut endless = advertisement_payload();
        endless[65] = 0;
        assert!(malformed(&with_checksum(endless)));
        let mut overlong = advertisement_payload();
        overlong[65] = 9;
        assert!(malformed(&with_checksum(overlong)));
    }

    #[test]
    fn a_cut_off_frame_of_any_length_is_malformed() {
        let whole = [
            frame(ETHERTYPE_ARP, &arp_payload(1, IP)),
            frame(ETHERTYPE_RARP, &arp_payload(3, IP)),
            frame(ETHERTYPE_IPV6, &with_checksum(advertisement_payload())),
        ];
        for frame in whole {
            for length in 0..frame.bytes.len() {
                let cut = Frame { bytes: frame.bytes[..length].to_vec(), ..frame.clone() };
                // Up to here an IPv6 frame does not say yet that it is an advertisement.
                let unnamed = frame.bytes[12] == 0x86 && length == ETHERNET_BYTES + IPV6_BYTES;
                let malformed = matches!(cut.kind(), FrameKind::Malformed { .. });
                assert!(malformed || unnamed, "{length}: {:?}", cut.kind());
                assert_eq!(cut.announced(), None);
            }
        }
    }
}
