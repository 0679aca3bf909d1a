//! Who stands at a target's door without having said who and what it is: how many there may be, and how many were turned away.
//!
//! What such a connection can cost is bounded: [`STRANGERS_MAX`] of them at most, [`STRANGERS_MAX_OF_ONE`] of one address, each
//! with a buffer of some KiB, for [`super::door::FIRST_BYTES_TIMEOUT`]. Where there are more, the oldest of those who are most has
//! to go: whoever is honest says what it wants at once, and gets through however many others say nothing.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Connections that have not said yet what they are.
pub(super) const STRANGERS_MAX: usize = 128;

/// The same, of one address.
pub(super) const STRANGERS_MAX_OF_ONE: usize = 64;

/// So many are logged one by one, so that nobody outside can fill a disk; then one in as many.
const LOGGED_MAX: u64 = 1000;

/// How many a target has turned away since it began to listen.
#[derive(Debug, Default)]
pub struct TurnedAway {
    connections: AtomicU64,
    streams: AtomicU64,
}

impl TurnedAway {
    /// Connections that did not say, or prove, who or what they are.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Data streams that did not belong to the migration under way.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    pub(super) fn connection(&self, peer: &str, why: impl Display) {
        count(&self.connections, peer, why);
    }

    pub(super) fn stream(&self, peer: &str, why: impl Display) {
        count(&self.streams, peer, why);
    }
}

fn count(counter: &AtomicU64, peer: &str, why: impl Display) {
    let before = counter.fetch_add(1, Ordering::Relaxed);
    if before < LOGGED_MAX || before.is_multiple_of(LOGGED_MAX) {
        tracing::warn!("{peer} was turned away: {why}");
    }
}

/// What somebody who has one address has: for IPv6 that is a whole network of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AddressGroup {
    V4(Ipv4Addr),
    /// The first 64 bits.
    V6([u16; 4]),
    /// By a Unix socket.
    ThisHost,
}

impl From<IpAddr> for AddressGroup {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

/// The strangers.
#[derive(Debug, Default)]
pub(super) struct Lobby {
    pub(super) turned_away: Arc<TurnedAway>,
    strangers: Mutex<Strangers>,
}

/// The oldest first.
#[derive(Debug, Default)]
struct Strangers {
    waiting: VecDeque<Stranger>,
    next: u64,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    group: AddressGroup,
    leaves: Arc<Notify>,
}

/// A place in the lobby, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    lobby: Arc<Lobby>,
    number: u64,
    leaves: Arc<Notify>,
}

impl Lobby {
    /// A place for a stranger, for which another one may have to leave.
    pub(super) fn enter(self: &Arc<Self>, group: AddressGroup) -> Place {
        let leaves = Arc::new(Notify::new());
        let mut strangers = self.strangers();
        if let Some(index) = strangers.one_too_many(group)
            && let Some(stranger) = strangers.waiting.remove(index)
        {
            stranger.leaves.notify_one();
        }
        let number = strangers.next;
        strangers.next += 1;
        strangers.waiting.push_back(Stranger { number, group, leaves: Arc::clone(&leaves) });
        Place { lobby: Arc::clone(self), number, leaves }
    }

    fn strangers(&self) -> MutexGuard<'_, Strangers> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Strangers {
    /// Who has to leave for one more of `group`: the oldest of it if there are as many of it as there may be, the oldest of
    /// those groups that have most if there are as many in all.
    fn one_too_many(&self, group: AddressGroup) -> Option<usize> {
        let mut counts = HashMap::<AddressGroup, usize>::new();
        for stranger in &self.waiting {
            *counts.entry(stranger.group).or_default() += 1;
        }
        if counts.get(&group).is_some_and(|&count| count >= STRANGERS_MAX_OF_ONE) {
            return self.waiting.iter().position(|stranger| stranger.group == group);
        }
        if self.waiting.len() < STRANGERS_MAX {
            return None;
        }
        let most = counts.values().copied().max();
        self.waiting.iter().position(|stranger| counts.get(&stranger.group).copied() == most)
    }
}

impl Place {
    /// Returns once it has gone to somebody newer.
    pub(super) async fn lost(&self) {
        self.leaves.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.lobby.strangers().waiting.retain(|stranger| stranger.number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(address: &str) -> AddressGroup {
        address.parse::<IpAddr>().unwrap().into()
    }

    fn has_lost(place: &Place) -> bool {
        let mut lost = std::pin::pin!(place.lost());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        lost.as_mut().poll(&mut context).is_ready()
    }

    #[test]
    fn one_address_takes_nobodys_place_but_its_own() {
        let lobby = Arc::new(Lobby::default());
        let other = lobby.enter(group("10.0.0.2"));
        let places: Vec<Place> =
            (0..STRANGERS_MAX_OF_ONE + 3).map(|_| lobby.enter(group("10.0.0.1"))).collect();
        let lost: Vec<bool> = places.iter().map(has_lost).collect();
        assert!(lost[..3].iter().all(|lost| *lost), "the oldest: {lost:?}");
        assert!(lost[3..].iter().all(|lost| !lost), "{lost:?}");
        assert!(!has_lost(&other));
        assert_eq!(lobby.strangers().waiting.len(), STRANGERS_MAX_OF_ONE + 1);
        drop((places, other));
        assert!(lobby.strangers().waiting.is_empty());
    }

    #[test]
    fn many_addresses_keep_nobody_out_who_comes_alone() {
        let lobby = Arc::new(Lobby::default());
        let mut crowd = Vec::new();
        let mut come = |count: u8| {
            for number in 0..count {
                crowd.push(lobby.enter(group(&format!("10.0.0.{}", number % 3))));
            }
        };
        come(200);
        let alone = lobby.enter(group("10.9.9.9"));
        come(200);
        assert_eq!(lobby.strangers().waiting.len(), STRANGERS_MAX);
        assert!(!has_lost(&alone));
    }

    #[test]
    fn a_group_is_an_address_or_a_network_of_version_6() {
        assert_eq!(group("fd00::1:0:0:0:1"), group("fd00::1:ffff:2:3:4"));
        assert_ne!(group("fd00:0:0:1::1"), group("fd00:0:0:2::1"));
        assert_eq!(group("::ffff:10.0.0.1"), group("10.0.0.1"));
        assert_ne!(group("10.0.0.1"), group("10.0.0.2"));
    }
}
