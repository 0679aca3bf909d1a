//! Who stands at a target's door without having said who and what it is: how many there may be, and how many were turned away.
//!
//! What such a connection can cost is bounded: [`STRANGERS_MAX`] of them at most, [`STRANGERS_MAX_OF_ONE`] of one address, each
//! with a buffer of some KiB, for [`super::door::FIRST_BYTES_TIMEOUT`].

use std::collections::HashMap;
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Connections that have not said yet what they are; more are closed at once.
pub(super) const STRANGERS_MAX: usize = 128;

/// The same, of one address, so that one host can't keep all others out.
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

/// The strangers by address.
#[derive(Debug, Default)]
pub(super) struct Lobby {
    pub(super) turned_away: Arc<TurnedAway>,
    waiting: Mutex<HashMap<IpAddr, usize>>,
}

/// A place in the lobby, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    lobby: Arc<Lobby>,
    address: IpAddr,
}

impl Lobby {
    /// A place for a stranger from `address`, if it has not too many already.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.entry(address).or_default();
        if *count == STRANGERS_MAX_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Place { lobby: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.lobby.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = waiting.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_room_for_others_and_gets_its_places_back() {
        let lobby = Arc::new(Lobby::default());
        let (greedy, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let mut places: Vec<Place> = std::iter::from_fn(|| lobby.enter(greedy)).collect();
        assert_eq!(places.len(), STRANGERS_MAX_OF_ONE);
        assert!(lobby.enter(other).is_some());
        places.pop();
        assert!(lobby.enter(greedy).is_some());
        drop(places);
        assert!(lobby.waiting.lock().unwrap().is_empty());
    }
}
