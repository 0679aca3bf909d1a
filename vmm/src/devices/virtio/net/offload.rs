//! Offloads: which virtio features stand for what a tap can do, and what may be in the headers of frames.
//!
//! ```text
//!  the guest leaves undone (CSUM, HOST_*)   ──► header ──► tap: the host's stack finishes or forwards it
//!  the tap leaves undone (GUEST_*)          ──► header ──► guest: as TUNSETOFFLOAD allowed it
//! ```
//!
//! A header never carries what was not agreed on, in either direction. What the fields mean beyond that (offsets inside
//! the frame) is checked by whoever finishes the frame: the host's kernel or the guest's.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::tap::{TapOffloads, VNET_HEADER_BYTES};

/// Offsets in the header.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const BUFFERS: usize = 10;

const CHECKSUM_NEEDED: u8 = byte(VIRTIO_NET_HDR_F_NEEDS_CSUM);
const CHECKSUM_VALID: u8 = byte(VIRTIO_NET_HDR_F_DATA_VALID);
const ECN: u8 = byte(VIRTIO_NET_HDR_GSO_ECN);
const NO_SEGMENTS: u8 = byte(VIRTIO_NET_HDR_GSO_NONE);
const TCP4: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV4);
const TCP6: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV6);
const UDP: u8 = byte(VIRTIO_NET_HDR_GSO_UDP_L4);

/// Features that depend on nothing.
const ALWAYS: u64 = bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE)
    | bit(VIRTIO_RING_F_EVENT_IDX);

/// What each offload of a tap lets a guest have, both ways.
const BY_OFFLOAD: [(TapOffloads, u64); 5] = [
    (TapOffloads::CHECKSUM, bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_GUEST_CSUM)),
    (TapOffloads::TCP4, bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO4)),
    (TapOffloads::TCP6, bit(VIRTIO_NET_F_HOST_TSO6) | bit(VIRTIO_NET_F_GUEST_TSO6)),
    (TapOffloads::TCP_ECN, bit(VIRTIO_NET_F_HOST_ECN) | bit(VIRTIO_NET_F_GUEST_ECN)),
    (TapOffloads::UDP, bit(VIRTIO_NET_F_HOST_USO) | UDP_BOTH),
];

/// A tap leaves UDP in large frames over IPv4 and IPv6, or over neither.
const UDP_BOTH: u64 = bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_USO6);

/// The features of this interface, in words.
const NAMES: [(u32, &str); 20] = [
    (VIRTIO_NET_F_CSUM, "checksums left to the host (CSUM)"),
    (VIRTIO_NET_F_GUEST_CSUM, "checksums left to the guest (GUEST_CSUM)"),
    (VIRTIO_NET_F_MAC, "a given MAC address (MAC)"),
    (VIRTIO_NET_F_GUEST_TSO4, "large TCP frames over IPv4 to the guest (GUEST_TSO4)"),
    (VIRTIO_NET_F_GUEST_TSO6, "large TCP frames over IPv6 to the guest (GUEST_TSO6)"),
    (VIRTIO_NET_F_GUEST_ECN, "large TCP frames with congestion marks to the guest (GUEST_ECN)"),
    (VIRTIO_NET_F_HOST_TSO4, "large TCP frames over IPv4 from the guest (HOST_TSO4)"),
    (VIRTIO_NET_F_HOST_TSO6, "large TCP frames over IPv6 from the guest (HOST_TSO6)"),
    (VIRTIO_NET_F_HOST_ECN, "large TCP frames with congestion marks from the guest (HOST_ECN)"),
    (VIRTIO_NET_F_MRG_RXBUF, "frames in several receive buffers (MRG_RXBUF)"),
    (VIRTIO_NET_F_STATUS, "the link's status (STATUS)"),
    (VIRTIO_NET_F_CTRL_VQ, "the control queue (CTRL_VQ)"),
    (VIRTIO_NET_F_GUEST_ANNOUNCE, "announcements by the guest (GUEST_ANNOUNCE)"),
    (VIRTIO_RING_F_EVENT_IDX, "notifications by index (EVENT_IDX)"),
    (VIRTIO_F_VERSION_1, "virtio 1 (VERSION_1)"),
    (VIRTIO_NET_F_GUEST_USO4, "large UDP frames over IPv4 to the guest (GUEST_USO4)"),
    (VIRTIO_NET_F_GUEST_USO6, "large UDP frames over IPv6 to the guest (GUEST_USO6)"),
    (VIRTIO_NET_F_HOST_USO, "large UDP frames from the guest (HOST_USO)"),
    (3, "the link's MTU (MTU)"),
    (22, "several queue pairs (MQ)"),
];

/// The constants of headers and commands are bytes, whatever their C type.
pub(super) const fn byte(constant: u32) -> u8 {
    let [byte, rest @ ..] = constant.to_le_bytes();
    assert!(matches!(rest, [0, 0, 0]));
    byte
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Whether all of `wanted` is in `features`.
pub(super) const fn has(features: u64, wanted: u32) -> bool {
    features & bit(wanted) != 0
}

/// What is offered to a guest on a tap with these offloads.
pub(super) fn offered(tap: TapOffloads) -> u64 {
    let possible = BY_OFFLOAD.into_iter().filter(|(offload, _)| tap.contains(*offload));
    possible.fold(ALWAYS, |features, (_, more)| features | more)
}

/// What a tap may leave undone in the frames for a driver with these features.
pub(super) fn for_driver(features: u64) -> TapOffloads {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return TapOffloads::NONE;
    }
    let wanted = [
        (TapOffloads::TCP4, bit(VIRTIO_NET_F_GUEST_TSO4)),
        (TapOffloads::TCP6, bit(VIRTIO_NET_F_GUEST_TSO6)),
        (TapOffloads::UDP, UDP_BOTH),
    ];
    let wanted = wanted.into_iter().filter(|(_, needs)| features & needs == *needs);
    let offloads = wanted.fold(TapOffloads::CHECKSUM, |offloads, (more, _)| offloads.and(more));
    let is_tcp = offloads.contains(TapOffloads::TCP4) || offloads.contains(TapOffloads::TCP6);
    // The kernel takes this one only together with TCP.
    if is_tcp && has(features, VIRTIO_NET_F_GUEST_ECN) {
        offloads.and(TapOffloads::TCP_ECN)
    } else {
        offloads
    }
}

/// Prepares a header from the guest for the tap; false if the frame can't be sent.
pub(super) fn accept_from_guest(header: &mut [u8; VNET_HEADER_BYTES], features: u64) -> bool {
    if !has(features, VIRTIO_NET_F_CSUM) {
        // Whatever the guest wrote here means nothing.
        header.fill(0);
        return true;
    }
    header[FLAGS] &= CHECKSUM_NEEDED;
    header[BUFFERS..].fill(0);
    match header[GSO_TYPE] & !ECN {
        NO_SEGMENTS => {
            header[GSO_TYPE] = NO_SEGMENTS;
            true
        }
        TCP4 => has(features, VIRTIO_NET_F_HOST_TSO4) && allows_ecn(header, features, VIRTIO_NET_F_HOST_ECN),
        TCP6 => has(features, VIRTIO_NET_F_HOST_TSO6) && allows_ecn(header, features, VIRTIO_NET_F_HOST_ECN),
        UDP => has(features, VIRTIO_NET_F_HOST_USO) && header[GSO_TYPE] == UDP,
        _ => false,
    }
}

/// Prepares a header from the tap for the guest; false if the guest can't take the frame, as one that has waited since
/// another driver had the interface.
pub(super) fn accept_from_tap(header: &mut [u8; VNET_HEADER_BYTES], features: u64) -> bool {
    let checksums = has(features, VIRTIO_NET_F_GUEST_CSUM);
    if !checksums && header[FLAGS] & CHECKSUM_NEEDED != 0 {
        return false;
    }
    header[FLAGS] &= if checksums { CHECKSUM_NEEDED | CHECKSUM_VALID } else { 0 };
    let is_taken = match header[GSO_TYPE] & !ECN {
        NO_SEGMENTS => true,
        TCP4 => {
            has(features, VIRTIO_NET_F_GUEST_TSO4) && allows_ecn(header, features, VIRTIO_NET_F_GUEST_ECN)
        }
        TCP6 => {
            has(features, VIRTIO_NET_F_GUEST_TSO6) && allows_ecn(header, features, VIRTIO_NET_F_GUEST_ECN)
        }
        UDP => features & UDP_BOTH == UDP_BOTH,
        _ => false,
    };
    set_buffers(header, 1);
    is_taken
}

/// Says in how many receive buffers a frame lies.
pub(super) fn set_buffers(header: &mut [u8], count: u16) {
    header[BUFFERS..VNET_HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
}

fn allows_ecn(header: &[u8; VNET_HEADER_BYTES], features: u64, needed: u32) -> bool {
    header[GSO_TYPE] & ECN == 0 || has(features, needed)
}

/// Features in words.
pub(super) fn describe(features: u64) -> String {
    let name = |number: u32| {
        let known = NAMES.iter().find(|(known, _)| *known == number);
        known.map_or_else(|| format!("feature {number}"), |(_, name)| (*name).to_owned())
    };
    let numbers = (0..u64::BITS).filter(|number| has(features, *number));
    numbers.map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: TapOffloads = TapOffloads::CHECKSUM
        .and(TapOffloads::TCP4)
        .and(TapOffloads::TCP6)
        .and(TapOffloads::TCP_ECN)
        .and(TapOffloads::UDP);

    fn header(flags: u8, gso_type: u8) -> [u8; VNET_HEADER_BYTES] {
        [flags, gso_type, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0xee, 0xee]
    }

    #[test]
    fn only_what_the_tap_can_do_is_offered_and_asked_for() {
        assert_eq!(offered(TapOffloads::NONE), ALWAYS);
        let some = offered(TapOffloads::CHECKSUM.and(TapOffloads::TCP4));
        assert_eq!(some & !ALWAYS, 1 | 1 << 1 | 1 << 7 | 1 << 11);
        let all = offered(ALL);
        assert_eq!(for_driver(all), ALL);
        assert_eq!(for_driver(all & !bit(VIRTIO_NET_F_GUEST_CSUM)), TapOffloads::NONE);
        assert_eq!(for_driver(some), TapOffloads::CHECKSUM.and(TapOffloads::TCP4));
        let half_udp =
            bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_USO4) | bit(VIRTIO_NET_F_GUEST_ECN);
        assert_eq!(for_driver(half_udp), TapOffloads::CHECKSUM);
    }

    #[test]
    fn headers_carry_nothing_that_was_not_agreed_on() {
        let all = offered(ALL);
        for (gso, to_host, to_guest) in [
            (TCP4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4),
            (TCP6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6),
            (TCP4 | ECN, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
            (UDP, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO6),
        ] {
            let mut out = header(CHECKSUM_NEEDED | CHECKSUM_VALID, gso);
            assert!(accept_from_guest(&mut out, all), "{gso}");
            assert_eq!(out, [1, gso, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
            assert!(!accept_from_guest(&mut header(1, gso), all & !bit(to_host)), "{gso}");
            let mut cleared = header(1, gso);
            assert!(accept_from_guest(&mut cleared, all & !bit(VIRTIO_NET_F_CSUM)));
            assert_eq!(cleared, [0; VNET_HEADER_BYTES]);

            let mut incoming = header(CHECKSUM_NEEDED, gso);
            assert!(accept_from_tap(&mut incoming, all), "{gso}");
            assert_eq!(incoming, [1, gso, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0]);
            assert!(!accept_from_tap(&mut header(1, gso), all & !bit(to_guest)), "{gso}");
            assert!(!accept_from_tap(&mut header(1, gso), all & !bit(VIRTIO_NET_F_GUEST_CSUM)), "{gso}");
        }
        for gso in [2, 3, 6, UDP | ECN, 0x40] {
            assert!(!accept_from_guest(&mut header(1, gso), all), "{gso}");
        }
        let mut valid = header(CHECKSUM_VALID, NO_SEGMENTS);
        assert!(accept_from_tap(&mut valid, 0));
        assert_eq!(valid[FLAGS], 0, "no driver without GUEST_CSUM looks at it");
    }

    #[test]
    fn features_are_named() {
        let text = describe(bit(VIRTIO_NET_F_HOST_USO) | bit(VIRTIO_NET_F_CSUM) | bit(63));
        assert_eq!(
            text,
            "checksums left to the host (CSUM), large UDP frames from the guest (HOST_USO), feature 63"
        );
        assert!(!describe(offered(ALL)).contains("feature "), "{}", describe(offered(ALL)));
    }
}
